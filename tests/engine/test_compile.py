"""torch.compile is opt-in and changes nothing but rounding: eager is the reference."""

import shutil

import pytest
import tiny
import torch

from lethe_mini import Engine, FullKV, Lethe, LethePlus, SnapKV

MIXTURE = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_experts": 7,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 13,
}
pytestmark = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler on PATH")


@pytest.fixture(autouse=True)
def forgotten():
    """Graphs and their count, from nothing to nothing."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def both(**changes):
    """The same random model, eager and compiled."""
    pair = Engine(tiny.model(**changes)), Engine(tiny.model(**changes))
    pair[1].model.compile()
    return pair


@pytest.mark.filterwarnings("ignore")  # PyTorch's own, while it compiles
@pytest.mark.parametrize("changes", [{}, {"num_key_value_heads": 6}, MIXTURE])
def test_compiled_equals_eager_and_compiles_a_handful(changes):
    """Same tokens and kept counts, alone and in ragged batches of several sizes, with grouped heads
    and without; and few graphs, none of them in a second run of the same kind."""
    pair = both(**changes)
    prompts = [[3, 1, 4, 1, 5, 9, 2, 6, 5, 3], list(range(1, 18)), [7]]
    cases = (
        (prompts[:1], FullKV(), 150),
        (prompts[:1], LethePlus(budget=48, interval=32), 200),
        (prompts[:2], LethePlus(budget=48, interval=32), 100),
        (prompts, LethePlus(budget=48, interval=32), 70),
        (prompts[:2], Lethe(budget=48, interval=32), 70),
        (prompts[:2], SnapKV(budget=40, window=8, protect_prompt=False), 70),
    )
    if "num_experts" in changes:  # whose layers take long to compile
        cases = cases[1:3]

    def run():
        for which, policy, length in cases:
            results = [e.generate(which, policy, max_new_tokens=length) for e in pair]
            mine, its = ([one.token_ids for one in result.sequences] for result in results)
            assert mine == its
            assert len({str(result.stats.kv_tokens_final) for result in results}) == 1

    run()
    first = graphs()
    # One sequence or more; scores or none; and a size that met another. Experts cut a layer in two.
    assert 0 < first <= (16 if "num_experts" in changes else 8)
    run()
    assert graphs() == first


@pytest.mark.filterwarnings("ignore")
def test_a_growing_cache_compiles_a_handful():
    """From 10 to 4,000 slots, and up and down with rounds: the number of graphs stays. (Beyond
    4,096 slots PyTorch makes another, and storage is larger than what it holds.)"""
    _, compiled = both(num_hidden_layers=1)
    prompt = [[3, 1, 4, 1, 5, 9, 2, 6, 5, 3]]
    compiled.generate(prompt, FullKV(), max_new_tokens=4000, ignore_eos=True)
    assert 0 < graphs() <= 3
    stats = compiled.generate(prompt, LethePlus(budget=100), max_new_tokens=4000).stats
    assert stats.rounds > 10
    assert graphs() <= 5


@pytest.mark.filterwarnings("ignore")
def test_compiling_is_told_apart_from_decoding():
    """The first run says how long it took, a second that it took nothing."""
    _, compiled = both()
    first, second = (compiled.generate([[1, 2, 3]], max_new_tokens=5).stats for _ in range(2))
    assert first.compile_seconds > first.decode_seconds > 0
    assert second.compile_seconds == 0
