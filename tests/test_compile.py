"""torch.compile is opt-in and changes nothing but rounding: eager is the reference."""

import shutil

import pytest
import tiny
import torch

from lethe_mini import Engine, FullKV, Lethe

pytestmark = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler on PATH")


@pytest.mark.filterwarnings("ignore")  # PyTorch's own, while it compiles
def test_compiled_equals_eager_and_compiles_a_handful():
    """Same tokens and kept counts while the cache grows from 10 to 700 slots with rounds, alone and
    in a ragged batch; and few graphs, none of them in a second run of the same kind."""
    torch._dynamo.reset()
    model = tiny.model()
    eager, compiled = Engine(model), Engine(tiny.model())
    compiled.model.compile()
    prompts = [[3, 1, 4, 1, 5, 9, 2, 6, 5, 3], list(range(1, 18))]
    cases = (
        (prompts[:1], FullKV(), 700),
        (prompts[:1], Lethe(budget=48, interval=32), 200),
        (prompts, Lethe(budget=48, interval=32), 100),
    )

    def run():
        for which, policy, length in cases:
            results = [e.generate(which, policy, max_new_tokens=length) for e in (eager, compiled)]
            mine, its = ([one.token_ids for one in result.sequences] for result in results)
            assert mine == its
            assert len({str(result.stats.kv_tokens_final) for result in results}) == 1

    run()
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert 0 < graphs <= 24  # 3 functions; one or more tokens, one or more sequences, masks
    run()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    torch._dynamo.reset()
