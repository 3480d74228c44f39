"""What cannot be done: each is one line that says what would be right, before anything runs."""

import math
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import runs
import tiny
import torch
from runs import VOCAB, Letters, ids

import lethe_mini
from lethe_mini import H2O, Engine, FullKV, Lethe, LethePlus, Policy, Pruner, UserError
from lethe_mini.policies import POLICIES

NAN, INF = math.nan, math.inf
MESSAGE = {"role": "user", "content": "hello"}
SYSTEM = {"role": "system", "content": "a"}


@pytest.fixture(scope="module")
def engine():
    return Engine(runs.model())


@contextmanager
def refused(match):
    """What stands inside raises a UserError of one line that matches."""
    with pytest.raises(UserError, match=match) as caught:
        yield caught
    assert len(str(caught.value).splitlines()) == 1


# --- Engine.generate

GENERATE = [
    ({"prompts": [[]]}, "the prompt is empty"),
    ({"prompts": [[1, 2], []]}, "the prompt is empty"),
    ({"prompts": [""]}, "the prompt is empty"),
    ({"prompts": [" \n"]}, "the prompt is empty"),
    ({"prompts": "text"}, r"prompts should be a list; give \[text\]"),
    ({"prompts": None}, "prompts should be a list of texts, not None"),
    ({"prompts": 7}, "prompts should be a list of texts, not 7"),
    ({"prompts": MESSAGE}, "prompts should be a list of texts, not {'role'"),
    ({"prompts": (text for text in ["hello"])}, "prompts should be a list of texts, not <gen"),
    ({"prompts": [1, 2, 3]}, "a prompt should be a text, messages or .* ids, not 1; .* list"),
    ({"prompts": [None]}, "a prompt should be a text, messages or a list of token ids, not None"),
    ({"prompts": [MESSAGE]}, r"should be a list of messages, not one of them; give \[messages\]"),
    ({"prompts": [[1], MESSAGE]}, r"not one of them; give \[messages\]"),
    ({"prompts": [["hello"]]}, "token ids should be whole numbers, not 'hello'"),
    ({"prompts": [[1, 2.0]]}, "token ids should be whole numbers, not 2.0"),
    ({"prompts": [[True]]}, "token ids should be whole numbers, not True"),
    ({"prompts": [[1, None]]}, "token ids should be whole numbers, not None"),
    ({"prompts": [[[1, 2]]]}, r"token ids should be whole numbers, not \[1, 2\]"),
    ({"prompts": torch.tensor([1, 2, 3])}, "a prompt should be a text, messages or a list of to"),
    ({"prompts": [[1, VOCAB]]}, f"from 0 to {VOCAB - 1}"),
    ({"prompts": [[-1]]}, f"from 0 to {VOCAB - 1}"),
    ({"prompts": [[1] * 42]}, "42 tokens and the model takes 41"),
    ({"prompts": [[1] * 13], "policy": Lethe(budget=13)}, "budget 13 is too small"),
    ({"policy": Lethe(budget=4, protect_prompt=False)}, "budget 4 is too small"),
    ({"policy": Lethe(budget=20, sinks=20)}, "budget 20 is too small"),
    ({"policy": "lethe"}, r"policy should be a policy such as Lethe\(\), not 'lethe'"),
    ({"policy": Lethe}, r"policy should be a policy such as Lethe\(\), not <class .*Lethe'>"),
    ({"policy": 0.25}, r"policy should be a policy such as Lethe\(\), not 0.25"),
    ({"max_new_tokens": 0}, "at least 1"),
    ({"max_new_tokens": -1}, "at least 1"),
    ({"max_new_tokens": 2.5}, "max_new_tokens should be a whole number, at least 1, not 2.5"),
    ({"max_new_tokens": "5"}, "max_new_tokens should be a whole number, at least 1, not '5'"),
    ({"max_new_tokens": None}, "max_new_tokens should be a whole number, at least 1, not None"),
    ({"max_new_tokens": [3, 4]}, "max_new_tokens has 2 numbers for 1 prompts"),
    ({"max_new_tokens": [0]}, "at least 1"),
    ({"max_new_tokens": [2.5]}, "max_new_tokens should be a whole number, at least 1, not 2.5"),
    ({"prefill_chunk": 0}, "at least 1"),
    ({"prefill_chunk": 1.5}, "prefill_chunk should be a whole number, at least 1, not 1.5"),
    ({"num_samples": 0}, "at least 1"),
    ({"num_samples": None}, "num_samples should be a whole number, at least 1, not None"),
    ({"batch_size": 0}, "at least 1"),
    ({"batch_size": "2"}, "batch_size should be a whole number, at least 1, not '2'"),
    ({"positions": "relative"}, "positions should be absolute or compact, not 'relative'"),
]


@pytest.mark.parametrize(("arguments", "match"), GENERATE)
def test_what_cannot_be_generated_is_refused_before_anything_is_computed(arguments, match):
    """One line that says what is wrong, and the model was never asked."""
    engine = Engine(runs.model(positions=41), Letters())
    engine.model.register_forward_hook(lambda *_: pytest.fail("it computed"))
    with refused(match):
        engine.generate(**{"prompts": [[1, 2]], **arguments})


MESSAGES = [
    ({"prompts": [[MESSAGE, 5]]}, "a message should have role and content, not be 5"),
    ({"prompts": [[5, MESSAGE]]}, "a message should have role and content, not be 5"),
    ({"prompts": [[MESSAGE, {"role": "user"}]]}, "a message has no content"),
    ({"prompts": ["a", [{"content": "a"}]]}, "a message has no role"),
    ({"prompts": [[MESSAGE | {"content": ["a"]}]]}, r"content should be a string, not \['a'\]"),
    ({"prompts": [[MESSAGE | {"content": "a\n" * 99, "role": 3}]]}, "role should be a string"),
    ({"prompts": [[MESSAGE]], "raw": True}, "messages need a chat template, and --raw leaves"),
    ({"prompts": [[SYSTEM, MESSAGE]], "system": "b"}, "have a system text already"),
    ({"prompts": ["a"], "think": "no"}, "think should be True, False or None, not 'no'"),
    ({"prompts": ["a"], "think": True, "raw": True}, "need a chat template, and --raw leaves it"),
]


def test_of_several_prompts_the_first_bad_one_is_named(engine):
    """By its number, from 1; a prompt that is alone needs none."""
    with refused(r"^prompt 3: the prompt is empty; give it some text$") as caught:
        engine.generate([[1], [2], [], []])
    assert (caught.value.number, caught.value.reason) == (
        2,
        "the prompt is empty; give it some text",
    )
    with refused("^the prompt is empty"):
        engine.generate([[]])


@pytest.fixture(scope="module")
def chatty(tmp_path_factory):
    """An engine with a tokenizer of bytes and a chat template."""
    folder = tiny.folder(tmp_path_factory.mktemp("model") / "tiny", template=tiny.THINKING)
    return Engine.from_pretrained(str(folder), "cpu")


@pytest.mark.parametrize(("arguments", "match"), MESSAGES)
def test_what_are_no_messages_is_refused_before_anything_is_computed(chatty, arguments, match):
    """One line, and the model was never asked."""
    hook = chatty.model.register_forward_hook(lambda *_: pytest.fail("it computed"))
    with refused(match):
        chatty.generate(**arguments)
    hook.remove()


def test_messages_texts_and_token_ids_are_prompts_side_by_side(chatty):
    """Messages are what the template makes of them; a last one of the assistant is continued."""
    begun = [SYSTEM, MESSAGE, {"role": "assistant", "content": "<think>\nIt"}]
    prompts = [[MESSAGE], "hello", [1, 2, 3], (SYSTEM, MESSAGE), begun]
    result = chatty.generate(prompts, H2O(budget=40, protect_prompt=False, interval=5), 17)
    written = [chatty.text.encode_prompt(one) for one in (*prompts[:2], *prompts[3:])]
    assert written[0] == written[1]
    assert chatty.text.decode(written[3]).endswith("assistant\n<think>\nIt")
    alone = chatty.generate(
        [*written[:2], prompts[2], *written[2:]],
        H2O(budget=40, protect_prompt=False, interval=5),
        17,
    )
    assert result.sequences == alone.sequences
    with_system = chatty.generate([[MESSAGE]], max_new_tokens=5, system="a")
    assert with_system.sequences == chatty.generate([prompts[3]], max_new_tokens=5).sequences


def test_thinking_is_told_to_the_template(chatty):
    """The run is that of the prompt which the template writes then."""
    for think in (True, False, None):
        result = chatty.generate(["hello", [MESSAGE]], max_new_tokens=7, think=think)
        ids = chatty.text.encode_prompt("hello", think=think)
        assert result.sequences == chatty.generate([ids, ids], max_new_tokens=7).sequences


IDS = [[1, 2], [3, 4]]


@pytest.mark.parametrize(
    "prompts",
    [IDS, ([1, 2], (3, 4)), torch.tensor(IDS), [torch.tensor(IDS[0]), IDS[1]]],
    ids=["lists", "tuples", "tensor", "tensors"],
)
def test_whatever_holds_token_ids_is_a_prompt(engine, prompts):
    result = engine.generate(prompts, max_new_tokens=5)
    assert result.sequences == engine.generate(IDS, max_new_tokens=5).sequences


@pytest.mark.parametrize(
    ("policy", "positions"),
    [
        (FullKV(), "absolute"),
        (H2O(budget=9), "absolute"),
        (LethePlus(budget=9, lag=3), "absolute"),
        (LethePlus(budget=9), "compact"),
    ],
)
def test_a_cache_goes_on_under_the_policy_and_positions_it_was_made_for(engine, policy, positions):
    """One without scores, with scores of another lag, with keys at other angles: refused."""
    own = LethePlus(budget=9)
    cache = engine.new_cache(own)
    engine.generate([ids(3)], own, max_new_tokens=5, cache=cache)
    with refused("made for another policy or other positions"):
        engine.generate([ids(3)], policy, max_new_tokens=5, positions=positions, cache=cache)


@pytest.mark.parametrize("options", [{"prompts": [[1], [2]]}, {"num_samples": 2}])
def test_a_resumed_cache_takes_exactly_one_prompt_and_one_sample(engine, options):
    cache = engine.new_cache(FullKV())
    with refused("a resumed cache takes exactly one prompt and one sample"):
        engine.generate(**{"prompts": [[1]], **options}, cache=cache)


def test_text_needs_a_tokenizer(engine):
    """An engine without one takes token ids, and gives no text."""
    with refused("no tokenizer"):
        engine.generate(["hello"])
    with refused("no tokenizer"):
        engine.generate([[MESSAGE]])
    assert engine.generate([ids(3)], max_new_tokens=5).sequences[0].text == ""


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"device": "tpu"}, "device should be auto, cpu, cuda or mps, not 'tpu'"),
        ({"device": "cpu:x"}, "'cpu:x'"),
        ({"device": ""}, "device should be"),
        ({"device": "cuda"}, "'cuda'"),
        ({"device": "cuda:1"}, "'cuda:1'"),
        ({"dtype": "int8"}, "dtype should be auto, .* not 'int8'"),
        ({"dtype": "float64"}, "dtype should be auto, .* not 'float64'"),
    ],
)
def test_a_device_or_dtype_that_is_not_there_is_refused(monkeypatch, tmp_path, arguments, match):
    """Before the model is looked for."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with refused(match):
        Engine.from_pretrained(str(tmp_path / "nowhere"), **arguments)


# --- policies


@pytest.mark.parametrize(
    ("policy", "arguments"),
    [
        (Lethe, {"interval": 0}),
        (Lethe, {"interval": 12.5}),
        (Lethe, {"interval": True}),
        (Lethe, {"sinks": -1}),
        (Lethe, {"sinks": None}),
        (Lethe, {"recent_ratio": -0.1}),
        (Lethe, {"recent_ratio": 1.1}),
        (Lethe, {"recent_ratio": NAN}),
        (Lethe, {"protect_prompt": "yes"}),
        (Lethe, {"gamma": -0.1}),
        (Lethe, {"gamma": 1.01}),
        (Lethe, {"gamma": NAN}),
        (Lethe, {"tau": 0.9}),
        (Lethe, {"tau": NAN}),
        (Lethe, {"tau": INF}),
        (Lethe, {"segments": 1}),
        (Lethe, {"evict_threshold": 0}),
        (Lethe, {"allocation": "square"}),
        (Lethe, {"allocation": "pyramid"}),
        (Lethe, {"allocation": "uniform", "budget": None}),
        (Lethe, {"breakpoint": "none", "budget": None}),
        (Lethe, {"breakpoint": None}),
        (Lethe, {"breakpoint": "auto"}),
        (LethePlus, {"allocation": "square"}),
        (LethePlus, {"per_head": "token"}),
        (LethePlus, {"even_share": 1.1}),
        (LethePlus, {"cap": -0.5}),
        (LethePlus, {"lag": -1}),
        (LethePlus, {"distinct_ratio": -0.1}),
        (LethePlus, {"alike": NAN}),
        (LethePlus, {"value_norm": 1}),
    ],
)
def test_a_policy_out_of_range_is_refused(policy, arguments):
    """When it is made, one line, with the option and its value."""
    name, value = next(iter(arguments.items()))
    with refused(name) as caught:
        policy(**arguments)
    assert str(value) in str(caught.value)


PRUNERS = {name: kind for name, kind in POLICIES.items() if issubclass(kind, Pruner)}


@pytest.mark.parametrize("kind", PRUNERS.values(), ids=PRUNERS)
@pytest.mark.parametrize(
    ("budget", "match"),
    [
        (0, "budget should be at least 1 token, not 0"),
        (-1, "budget should be at least 1 token, not -1"),
        (0.0, "budget should be a share above 0 and at most 1, or a whole number, not 0.0"),
        (-0.25, "budget should be a share above 0 and at most 1, or a whole number, not -0.25"),
        (1.5, "budget should be a share above 0 and at most 1, or a whole number, not 1.5"),
        (7.0, "budget should be a share above 0 and at most 1, or a whole number, not 7.0"),
        (NAN, "budget should be a share above 0 and at most 1, or a whole number, not nan"),
        (INF, "budget should be a share above 0 and at most 1, or a whole number, not inf"),
        (True, r"budget should be .* 512, a share such as 0.25 \(25%\), or none, not True"),
        (False, "budget should be .*, not False"),
        ("25%", "budget should be .* 0.25 .*, not '25%'"),
        ("512", "budget should be .*, not '512'"),
        ((0.25,), r"budget should be .*, not \(0.25,\)"),
    ],
)
def test_a_budget_that_makes_no_sense_is_refused(kind, budget, match):
    """By every policy alike, and the line tells the three things that a budget can be."""
    with refused(match):
        kind(budget=budget)


def test_only_lethe_itself_goes_without_a_budget():
    """Algorithm 1 decides there alone. Every other policy says what a budget would be."""
    assert Lethe(budget=None).budget is None
    for kind in PRUNERS.values():
        if kind is not Lethe:
            need = f"{kind.__name__} needs a budget: a number such as 512 or a share such as 0.25"
            with refused(need):
                kind(budget=None)


@pytest.mark.parametrize("budget", [1, 10**9, 0.25, 1.0, 1e-9])
def test_every_policy_takes_a_number_or_a_share(budget):
    for kind in PRUNERS.values():
        assert kind(budget=budget).budget == budget
        assert kind().budget == 0.25


def test_a_pruner_without_importance_says_what_it_lacks():
    """When it is made, and not in the middle of a text."""

    @dataclass(frozen=True)
    class Forgetful(Pruner):
        pass

    @dataclass(frozen=True)
    class Whole(Forgetful):
        def importance(self, layer, cache):
            return layer.positions.float()

    for kind in (Pruner, Forgetful):
        with refused(rf"{kind.__name__} should define importance\(layer, cache\)"):
            kind()
    assert Whole().budget == 0.25


# --- the package

PUBLIC = """
Engine Sampling UserError Policy Pruner FullKV Lethe LethePlus StreamingLLM H2O TOVA SnapKV
PyramidKV RKV RandomKV Recall Result Stats Generated CheckpointWarning
"""


def test_the_package_offers_what_a_user_needs():
    """`from lethe_mini import H2O` and all the others; every policy under its class's name."""
    assert sorted(lethe_mini.__all__) == sorted(PUBLIC.split())
    for name in PUBLIC.split():
        assert getattr(lethe_mini, name).__name__ == name
    for kind in POLICIES.values():
        assert getattr(lethe_mini, kind.__name__) is kind
        assert issubclass(kind, Policy)
