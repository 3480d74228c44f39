"""Batches: a sequence gets what it gets alone, and a file of prompts gets each result exactly once.

Neighbours, order, batch size, number of samples and interruptions change nothing but the time. In
float32 a matrix product may round differently with the size of the batch, so logits are compared to
1e-4; tokens and kept positions are compared exactly, in every layer after every step.
"""

import dataclasses
import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
import weakref
from typing import ClassVar

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lethe_mini.engine
from lethe_mini.app.batch import run_batch
from lethe_mini.app.cli import main
from lethe_mini.app.prompts import Prompt, read_prompts
from lethe_mini.engine import Engine
from lethe_mini.errors import UserError
from lethe_mini.generation.sampling import Sampling
from lethe_mini.generation.stats import allocated
from lethe_mini.kernels import BLOCK, blocks
from lethe_mini.policies import POLICIES, LethePlus
from lethe_mini.policy import FullKV, Lethe, Pruner

LENGTHS = [1, 300, 2, 97, 151, 23, 64, 211]  # of the prompts in a batch of 8
VOCAB = tiny.SIZES["vocab_size"]
few = settings(max_examples=max(5, settings.default.max_examples // 12))


def make(policy, **changes):
    """A policy that prunes often, as far as it has the options."""
    options = {"budget": 41, "interval": 7, "window": 8, "protect_prompt": False, **changes}
    names = {spec.name for spec in dataclasses.fields(policy)}
    return policy(**{name: value for name, value in options.items() if name in names})


CASES = {name: make(policy) for name, policy in POLICIES.items()}
CASES |= {
    "lethe-protected": make(Lethe, budget=310, protect_prompt=True),
    "lethe-alone": make(Lethe, budget=None, evict_threshold=31, tau=5.0),
    "lethe-share": make(Lethe, budget=0.3, evict_threshold=31),
    "lethe-plus-norm": make(LethePlus, value_norm=True, breakpoint="global", tau=20.0),
}


@pytest.fixture(scope="module")
def engine():
    return tiny.engine()


def ids(length, seed):
    rng = random.Random(f"{length}-{seed}")
    return [rng.randrange(VOCAB) for _ in range(length)]


def same(one, other):
    """Two results are the same, sequence by sequence, but for the number and the bytes of a row."""
    assert one.sequences == other.sequences
    assert one.stats.kv_tokens_final == other.stats.kv_tokens_final


@dataclasses.dataclass
class Trace:
    """What became of each sequence: its logits, and after each step its positions per layer."""

    logits: dict
    kept: dict


def traced(monkeypatch, engine, prompts, policy, limits, **options):
    """Runs a batch and looks at every step of it. -> (result, Trace)"""
    trace, logits_ahead, rows, ended = Trace({}, {}), [], [], set()
    sample = lethe_mini.engine.sample

    def watched(logits, *args):
        logits_ahead.extend(logits.clone())  # of tokens that are told at the next step
        return sample(logits, *args)

    def on_token(index, token):
        trace.logits.setdefault(index, []).append(logits_ahead.pop(0))
        rows.append(index)

    def on_step(cache):
        live = [index for index in rows if index not in ended]
        rows.clear()
        for row, index in enumerate(live):
            held = [layer.positions[row, :, : layer.lengths[row]] for layer in cache.layers]
            trace.kept.setdefault(index, []).append([positions.tolist() for positions in held])

    with monkeypatch.context() as patch:
        patch.setattr(lethe_mini.engine, "sample", watched)
        result = engine.generate(
            prompts,
            policy,
            limits,
            on_token=on_token,
            on_step=on_step,
            on_finish=lambda index, one: ended.add(index),
            **options,
        )
    return result, trace


# -- a sequence and its neighbours -----------------------------------------------------------------


@pytest.mark.parametrize("policy", CASES.values(), ids=CASES)
@pytest.mark.parametrize("temperature", [0.0, 1.0], ids=["greedy", "sampled"])
def test_a_batch_is_each_prompt_alone(monkeypatch, engine, policy, temperature):
    """Eight prompts of 1 to 300 tokens, all at once and three at a time, with different ends: every
    sequence has the tokens, the logits (to 1e-4) and the kept positions that it has alone."""
    prompts = [ids(length, 0) for length in LENGTHS]
    limits = [9, 24, 24, 16, 1, 24, 20, 12]
    options = {"temperature": temperature, "seed": 5}
    runs = [
        traced(monkeypatch, engine, prompts, policy, limits, batch_size=size, **options)
        for size in (8, 3)
    ]
    for index, prompt in enumerate(prompts):
        alone, mine = traced(monkeypatch, engine, [prompt], policy, limits[index], **options)
        for together, trace in runs:
            assert together.sequences[index] == alone.sequences[0]
            final = together.stats.kv_tokens_final[index]
            assert final == alone.stats.kv_tokens_final[0]
            assert trace.kept.get(index, []) == mine.kept.get(0, [])
            torch.testing.assert_close(
                torch.stack(trace.logits[index]), torch.stack(mine.logits[0]), rtol=0, atol=1e-4
            )
    for together, _ in runs:
        assert together.stats.rounds == runs[0][0].stats.rounds
        assert (together.stats.rounds > 0) == (policy.name != "full")


@pytest.mark.parametrize("size", range(1, 9))
def test_any_batch_size_gives_the_same(engine, size):
    """One to eight sequences at once: the same results, in the order of the prompts."""
    prompts = [ids(length, 1) for length in (5, 300, 1, 80, 33, 7, 120, 2, 61)]
    policy, limits = CASES["lethe"], [15, 4, 22, 9, 1, 17, 30, 8, 12]
    options = {"temperature": 0.7, "top_k": 50, "seed": 2}
    all_at_once = engine.generate(prompts, policy, limits, **options)
    same(engine.generate(prompts, policy, limits, batch_size=size, **options), all_at_once)


@few
@given(
    order=st.permutations(range(6)),
    name=st.sampled_from([*CASES]),
    temperature=st.sampled_from([0.0, 1.0]),
    batch_size=st.sampled_from([None, 1, 2, 4]),
)
def test_permuting_a_batch_permutes_the_results(engine, order, name, temperature, batch_size):
    """Prompts may differ in nothing but order: sequence i of a permuted batch is order[i]."""
    prompts, limits = [ids(n, 2) for n in (3, 40, 1, 90, 17, 2)], [12, 5, 19, 8, 1, 15]
    policy, options = CASES[name], {"temperature": temperature, "seed": 3}
    plain = engine.generate(prompts, policy, limits, **options)
    permuted = engine.generate(
        [prompts[i] for i in order],
        policy,
        [limits[i] for i in order],
        batch_size=batch_size,
        **options,
    )
    assert permuted.sequences == [plain.sequences[i] for i in order]
    final = plain.stats.kv_tokens_final
    assert permuted.stats.kv_tokens_final == [final[i] for i in order]


def test_equal_prompts_give_equal_results(engine):
    """The same prompt in several rows: what counts is the prompt, not the row."""
    for temperature in (0.0, 1.0):
        result = engine.generate([ids(60, 3)] * 5, CASES["lethe"], 25, temperature=temperature)
        assert all(one == result.sequences[0] for one in result.sequences)


class Bytes:
    """A stand-in for Text in which some tokens end a text."""

    sampling: ClassVar[dict] = {}

    def __init__(self, *eos_ids):
        self.eos_ids = frozenset(eos_ids)

    def decode(self, tokens):
        return "".join(chr(0x100 + token) for token in tokens)


@pytest.mark.parametrize("name", ["full", "lethe", "lethe-protected", "snapkv", "random"])
def test_an_early_end_changes_nothing_for_the_others(monkeypatch, engine, name):
    """Some sequences end at once, by end of text or by length; the others do not notice: the same
    tokens and kept positions as where nobody ends."""
    prompts = [ids(length, 4) for length in LENGTHS]
    options = {"temperature": 1.0, "seed": 7}
    endless, whole = traced(monkeypatch, engine, prompts, CASES[name], 40, **options)
    tokens = [one.token_ids for one in endless.sequences]
    eos = next(t for t in tokens[1][:9] if any(t not in other for other in tokens))
    ending = Engine(engine.model, Bytes(eos))
    limits = [40, 40, 1, 40, 2, 40, 40, 40]
    result, trace = traced(monkeypatch, ending, prompts, CASES[name], limits, **options)
    reasons = [one.finish_reason for one in result.sequences]
    assert "stop" in reasons
    for index, one in enumerate(result.sequences):
        stop = tokens[index].index(eos) + 1 if eos in tokens[index] else 1000
        count = min(stop, limits[index])
        assert one.token_ids == tokens[index][:count]
        assert one.finish_reason == ("stop" if stop <= limits[index] else "length")
        assert trace.kept.get(index, []) == whole.kept[index][: count - 1]
    assert reasons.count("length") > 2


def test_the_memory_of_what_ended_is_released(engine):
    """When a sequence ends its rows are gone, capacity shrinks to the longest that is left, the old
    storage is dropped, and the figure of all storages falls with it."""
    prompts, limits = [ids(n, 5) for n in (300, 40, 7)], [5, 20, 30]
    seen, old = [], []

    def on_step(cache):
        layers = cache.layers
        batch = {tensor.shape[0] for layer in layers for tensor in layer.store.values()}
        capacity = {layer.capacity for layer in layers}
        assert len(batch) == len(capacity) == 1
        slots = {layer.length for layer in layers}
        seen.append((*batch, *capacity, *slots, allocated(cache)))
        old.append(weakref.ref(layers[0].store["keys"]))

    engine.generate(prompts, FullKV(), limits, on_step=on_step)
    rows = [row for row, *_ in seen]
    assert rows == [3] * 4 + [2] * 15 + [1] * 10
    for batch, capacity, slots, taken in seen:
        assert blocks(slots) <= capacity <= blocks(slots + slots // 16) + BLOCK
        # keys and values of 2 heads of 10 float32 and an int32 position per head, in 3 layers; and
        # a count a layer and one in all
        slot = 2 * (2 * 10 * 4 + 4)
        assert taken == batch * (3 * capacity * slot + 3 * 8 + 8)
    assert [seen[i][1] // BLOCK for i in (3, 4, 19)] == [5, 1, 1]
    assert old[3]() is None
    assert old[18]() is None


# -- samples ---------------------------------------------------------------------------------------


class Counted:
    """A model that counts the tokens it reads, as prompts and one by one."""

    def __init__(self, model):
        self.model, self.read, self.steps = model, 0, 0

    def __getattr__(self, name):
        return getattr(self.model, name)

    def __call__(self, tokens, *args, last_only=False, **kwargs):
        if last_only:
            self.read += tokens.numel()
        else:
            self.steps += tokens.numel()
        return self.model(tokens, *args, last_only=last_only, **kwargs)


@pytest.mark.parametrize("name", ["full", "lethe", "lethe-plus-norm", "rkv", "random"])
def test_samples_share_one_prefill_and_do_not_depend_on_their_number(engine, name):
    """Sample i is the same among 1, 2, 5 or 8; one prefill serves all; different samples differ."""
    prompt, options = ids(77, 6), {"temperature": 1.0, "seed": 11}
    most = engine.generate([prompt], CASES[name], 25, num_samples=8, **options)
    assert len({tuple(one.token_ids) for one in most.sequences}) == 8
    for number in (1, 2, 5):
        counted = Engine(engine.model)
        counted.model = Counted(engine.model)
        some = counted.generate([prompt], CASES[name], 25, num_samples=number, **options)
        assert some.sequences == most.sequences[:number]
        assert some.stats.kv_tokens_final == most.stats.kv_tokens_final[:number]
        assert (counted.model.read, counted.model.steps) == (77, 24 * number)
    other_seed = engine.generate([prompt], CASES[name], 25, temperature=1.0, seed=12)
    assert other_seed.sequences[0] != most.sequences[0]


def test_forks_do_not_share_what_they_write(engine):
    """Samples that end at different times go on from one prefill without touching each other."""
    prompt, options = ids(70, 7), {"temperature": 1.0, "seed": 1}
    endless = engine.generate([prompt], CASES["lethe"], 40, num_samples=6, **options)
    eos = endless.sequences[2].token_ids[5]
    ending = Engine(engine.model, Bytes(eos))
    result = ending.generate([prompt], CASES["lethe"], 40, num_samples=6, **options)
    for one, whole in zip(result.sequences, endless.sequences, strict=True):
        tokens = whole.token_ids
        assert one.token_ids == (tokens[: tokens.index(eos) + 1] if eos in tokens else tokens)


# -- prompt files ----------------------------------------------------------------------------------


def written(path, lines):
    path.write_text("".join(lines), encoding="utf-8")
    return path


def test_a_text_file_has_a_prompt_a_line(tmp_path):
    """Empty lines are passed over and a prompt goes by its line's number; nothing else is cut."""
    file = written(
        tmp_path / "p.txt", ["first\n", "\n", "  two words \n", "   \n", '{"prompt": 1}']
    )
    assert read_prompts(file) == [
        Prompt(1, "first"),
        Prompt(3, "  two words "),
        Prompt(5, '{"prompt": 1}'),
    ]
    file.write_bytes("naïve\r\nçava\r\n".encode())
    assert [prompt.prompt for prompt in read_prompts(file)] == ["naïve", "çava"]


@pytest.mark.parametrize("suffix", [".jsonl", ".ndjson"])
def test_a_json_lines_file_has_an_object_a_line(tmp_path, suffix):
    """prompt or messages, and maybe id and max_new_tokens; other keys are nobody's business here,
    but those of a message are kept."""
    turns = [{"role": "user", "content": "é"}, {"role": "assistant", "content": "", "mood": None}]
    lines = [
        '{"prompt": "a\\nb"}\n',
        "\n",
        '{"prompt": "é", "id": "x", "max_new_tokens": 3, "more": null}\n',
        '{"prompt": "c", "id": 70}\n',
        json.dumps({"messages": turns, "max_new_tokens": 2}),
    ]
    assert read_prompts(written(tmp_path / f"p{suffix}", lines)) == [
        Prompt(1, "a\nb"),
        Prompt("x", "é", 3),
        Prompt(70, "c"),
        Prompt(5, turns, 2),
    ]


BAD = {
    "broken": '{"prompt": "a"',
    "no-json": "hello",
    "list": '["a"]',
    "null": "null",
    "no-prompt": '{"id": 1}',
    "prompt-null": '{"prompt": null}',
    "prompt-number": '{"prompt": 3}',
    "prompt-empty": '{"prompt": " \\n"}',
    "id-float": '{"prompt": "a", "id": 1.5}',
    "id-bool": '{"prompt": "a", "id": true}',
    "id-list": '{"prompt": "a", "id": []}',
    "limit-0": '{"prompt": "a", "max_new_tokens": 0}',
    "limit-text": '{"prompt": "a", "max_new_tokens": "3"}',
    "limit-bool": '{"prompt": "a", "max_new_tokens": true}',
    "deep": "[" * 100_000,
    "surrogate-prompt": '{"prompt": "\\ud800"}',
    "surrogate-message": '{"messages": [{"role": "user", "content": "\\ud800"}]}',
    "both": '{"prompt": "a", "messages": [{"role": "user", "content": "a"}]}',
    "messages-null": '{"messages": null}',
    "messages-text": '{"messages": "a"}',
    "messages-object": '{"messages": {"role": "user", "content": "a"}}',
    "messages-empty": '{"messages": []}',
    "message-text": '{"messages": ["a"]}',
    "no-role": '{"messages": [{"content": "a"}]}',
    "no-content": '{"messages": [{"role": "user", "content": "a"}, {"role": "user"}]}',
    "role-number": '{"messages": [{"role": 1, "content": "a"}]}',
    "content-null": '{"messages": [{"role": "user", "content": null}]}',
    "content-list": '{"messages": [{"role": "user", "content": [{"text": "a"}]}]}',
    "surrogate-id": '{"prompt": "a", "id": "\\ud800"}',
}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_a_bad_line_is_named_before_anything_is_computed(tmp_path, capsys, bad):
    """One line of error that names the line, exit code 2; no model was even looked for, and no
    output file is there."""
    lines = ['{"prompt": "a"}\n', "\n", '{"prompt": "b"}\n', bad + "\n", '{"prompt": "c"}\n']
    file, output = written(tmp_path / "p.jsonl", lines), tmp_path / "out.jsonl"
    argv = ["--model", str(tmp_path / "none"), "--prompt-file", str(file), "--output", str(output)]
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert "line 4" in error
    assert len(error.splitlines()) == 1
    assert not output.exists()


SYSTEM_TOO = '{"messages": [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]}'


@pytest.mark.parametrize("option", [("--raw",), ("--system", "Be brief.")])
def test_messages_that_the_options_do_not_go_with_are_named(tmp_path, capsys, option):
    """--raw leaves out what would write them, and a second system text is one too many."""
    file = written(tmp_path / "p.jsonl", ['{"prompt": "a"}\n', SYSTEM_TOO])
    assert main(["--model", str(tmp_path / "none"), "--prompt-file", str(file), *option]) == 2
    error = capsys.readouterr().err
    assert "line 2" in error
    assert len(error.splitlines()) == 1


# -- output files ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint whose texts often end by themselves: some letters end them."""
    return tiny.folder(tmp_path_factory.mktemp("model") / "tiny", eos=(257, 70, 80, 90, 100))


@pytest.fixture(scope="module")
def named(folder):
    return Engine.from_pretrained(str(folder), device="cpu", dtype="float32")


TEXTS = ["Why?", "a b c " * 12, "x", "né" * 40, "line\u2028break", "12345678" * 9, "end", "Why?"]
PROMPTS = [Prompt(f"p{i}", text, 5 + i if i % 3 else None) for i, text in enumerate(TEXTS)]
POLICY = Lethe(budget=60, interval=5, protect_prompt=False)
OPTIONS = {
    "max_new_tokens": 33,
    "temperature": 1.0,
    "seed": 4,
    "raw": True,
    "quiet": True,
    "num_samples": 1,
}


def batch(engine, output, prompts=PROMPTS, policy=POLICY, **changes):
    options = {**OPTIONS, **changes}
    draws = {spec.name for spec in dataclasses.fields(Sampling)}
    sampling = Sampling(**{name: value for name, value in options.items() if name in draws})
    options = {name: value for name, value in options.items() if name not in draws}
    return run_batch(engine, prompts, policy, output, sampling=sampling, **options)


def lines_of(path):
    data = path.read_bytes()
    assert data.endswith(b"\n") or not data
    return data.split(b"\n")[:-1]


@pytest.fixture(scope="module")
def whole(named, tmp_path_factory):
    """The lines of an uninterrupted run."""
    output = tmp_path_factory.mktemp("out") / "whole.jsonl"
    assert batch(named, output) is not None
    return lines_of(output)


def test_each_line_says_all_of_its_sequence(named, whole, tmp_path):
    """id, sample, prompt, text, tokens, why it ended: one object a line, each prompt once, and the
    sequences are those of `generate`."""
    entries = {entry["id"]: entry for entry in map(json.loads, whole)}
    assert len(whole) == len(entries) == len(PROMPTS)
    alone = named.generate(
        TEXTS, POLICY, [p.max_new_tokens or 33 for p in PROMPTS], temperature=1.0, seed=4, raw=True
    )
    for prompt, one in zip(PROMPTS, alone.sequences, strict=True):
        entry = entries[prompt.id]
        assert (entry["prompt"], entry["sample"]) == (prompt.prompt, 0)
        assert dataclasses.asdict(one).items() <= entry.items()
    assert {entry["finish_reason"] for entry in entries.values()} == {"stop", "length"}
    assert len({len(line) for line in whole}) > 1


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5, 8, 100])
def test_any_batch_size_writes_the_same_lines(named, whole, tmp_path, batch_size):
    """In the order in which the sequences end; with one at a time, that of the prompts."""
    output = tmp_path / "out.jsonl"
    batch(named, output, batch_size=batch_size)
    assert sorted(lines_of(output)) == sorted(whole)
    if batch_size == 1:
        assert [json.loads(line)["id"] for line in lines_of(output)] == [p.id for p in PROMPTS]


def test_a_line_is_on_the_disk_as_soon_as_its_sequence_ends(monkeypatch, named, tmp_path):
    """Looked at before every step: only whole lines, ever more, as many as have ended."""
    output, counts = tmp_path / "out.jsonl", []
    sample = lethe_mini.engine.sample

    def looking(*args):
        counts.append(len(lines_of(output)))
        return sample(*args)

    monkeypatch.setattr(lethe_mini.engine, "sample", looking)
    batch(named, output, batch_size=2)
    assert counts == sorted(counts)
    assert counts[0] == 0
    assert {*range(len(PROMPTS) - 1)} <= {*counts, len(PROMPTS) - 2}


@few
@given(data=st.data())
def test_a_second_run_completes_what_is_missing(named, whole, tmp_path_factory, data):
    """Any of the lines in any order, and maybe the beginning of one more: what is there stays as it
    is, only what is missing is computed, and the lines are those of an uninterrupted run."""
    there = data.draw(st.permutations(whole))[: data.draw(st.integers(0, len(whole)))]
    rest = [line for line in whole if line not in there]
    torn = b""
    if rest:
        cut = data.draw(st.integers(0, len(rest[0])))
        torn = rest[0][:cut]
    output = tmp_path_factory.mktemp("out") / "out.jsonl"
    output.write_bytes(b"".join(line + b"\n" for line in there) + torn)
    result = batch(named, output, batch_size=3)
    assert lines_of(output)[: len(there)] == there
    assert sorted(lines_of(output)) == sorted(whole)
    if rest:
        assert len(result.sequences) == len(rest)
    else:
        assert result is None


def test_a_complete_file_is_left_alone(monkeypatch, named, whole, tmp_path):
    """Nothing is computed, no byte changes."""
    output = tmp_path / "out.jsonl"
    batch(named, output)
    before = output.read_bytes(), output.stat().st_mtime_ns
    monkeypatch.setattr(named, "generate", lambda *_, **__: pytest.fail("computed"))
    assert batch(named, output) is None
    assert (output.read_bytes(), output.stat().st_mtime_ns) == before


def test_more_prompts_go_on_with_the_file_of_fewer(named, whole, tmp_path):
    """A longer list of prompts, in any order, completes the file of a shorter one."""
    output = tmp_path / "out.jsonl"
    batch(named, output, PROMPTS[:3])
    batch(named, output, PROMPTS[::-1], batch_size=2)
    assert sorted(lines_of(output)) == sorted(whole)


def test_samples_of_a_prompt_are_lines_of_their_own(named, tmp_path):
    """Samples that are missing are made, those that are there are not written again; more samples
    go on with the file of fewer."""
    full, part = tmp_path / "full.jsonl", tmp_path / "part.jsonl"
    prompts = PROMPTS[:3]
    batch(named, full, prompts, num_samples=3)
    lines = sorted(lines_of(full))
    pairs = [(entry["id"], entry["sample"]) for entry in map(json.loads, lines)]
    assert sorted(pairs) == [(p.id, i) for p in prompts for i in range(3)]
    batch(named, part, prompts, num_samples=1)
    assert set(lines_of(part)) < set(lines)
    with part.open("ab") as file:
        file.write(next(line for line in lines if b'"sample": 2' in line) + b"\n")
    batch(named, part, prompts, num_samples=3, batch_size=2)
    assert sorted(lines_of(part)) == lines


OTHERS = {
    "tokens": {"max_new_tokens": 34},
    "temperature": {"temperature": 0.5},
    "top-k": {"top_k": 9},
    "top-p": {"top_p": 0.9},
    "seed": {"seed": 5},
    "template": {"raw": False},
    "system": {"raw": False, "system": "Be brief."},
    "think": {"raw": False, "think": False},
    "positions": {"positions": "compact"},
    "eos": {"ignore_eos": True},
    "policy": {"policy": FullKV()},
    "budget": {"policy": Lethe(budget=61, interval=5, protect_prompt=False)},
    "other-text": {"prompts": [Prompt("p0", "Why not?", None), *PROMPTS[1:]]},
    "other-ids": {"prompts": [Prompt(i, text) for i, text in enumerate(TEXTS)]},
    "fewer": {"prompts": PROMPTS[:4]},
    "other-limit": {"prompts": [Prompt(p.id, p.prompt, 99) for p in PROMPTS]},
}


@pytest.mark.parametrize("changes", OTHERS.values(), ids=OTHERS)
@pytest.mark.parametrize("missing", [0, 3])
def test_a_file_of_other_settings_or_prompts_is_refused(named, whole, tmp_path, changes, missing):
    """Not mixed, and not touched: complete or not, torn or not."""
    output = tmp_path / "out.jsonl"
    content = b"".join(line + b"\n" for line in whole[missing:])
    for tail in (b"", whole[0][:30]):
        output.write_bytes(content + tail)
        with pytest.raises(UserError, match=r"other (settings|prompts)"):
            batch(named, output, **changes)
        assert output.read_bytes() == content + tail


FOREIGN = {
    "text": b"my notes\nof today\n",
    "text-torn": b"my notes, of which I have no copy",
    "json": b'{"a": 1}\n',
    "array": b"[]\n",
    "ids-list": b'{"id": [1], "sample": 0, "prompt": "Why?", "run": "0"}\n',
    "sample-text": b'{"id": "p0", "sample": "0", "prompt": "Why?", "run": "0"}\n',
    "sample-beyond": b'{"id": "p0", "sample": 1, "prompt": "Why?", "run": "0"}\n',
    "binary": bytes(range(256)) + b"\n",
    "empty-line": b"\n",
    "deep": b"[" * 100_000 + b"\n",
}


@pytest.mark.parametrize("content", FOREIGN.values(), ids=FOREIGN)
def test_a_file_of_something_else_is_refused_and_not_harmed(named, tmp_path, content):
    """Whatever it holds, in whole lines or not: one error, and every byte is still there."""
    output = tmp_path / "out.jsonl"
    output.write_bytes(content)
    with pytest.raises(UserError):
        batch(named, output)
    assert output.read_bytes() == content


def test_a_line_that_is_there_twice_is_refused(named, whole, tmp_path):
    """As two runs at a time would write it."""
    output = tmp_path / "out.jsonl"
    output.write_bytes(b"".join(line + b"\n" for line in [*whole[:3], whole[1]]))
    with pytest.raises(UserError, match=r"line 4.* twice"):
        batch(named, output)


def test_what_cannot_be_written_ends_in_one_error(monkeypatch, named, tmp_path):
    """A folder that is not there, a folder instead of a file, a full disk."""
    for output in (tmp_path / "none" / "out.jsonl", tmp_path):
        with pytest.raises(UserError, match="cannot"):
            batch(named, output)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(UserError, match="cannot write"):
        batch(named, tmp_path / "out.jsonl")


def test_a_prompt_that_does_not_fit_is_refused_before_anything_is_written(named, tmp_path):
    """Too long for the model's positions, or for the budget: the others are not begun."""
    output = tmp_path / "out.jsonl"
    with pytest.raises(UserError, match="4094 tokens"):
        batch(named, output, [*PROMPTS, Prompt("long", "x" * 4094)])
    with pytest.raises(UserError, match="budget"):
        batch(named, output, policy=Lethe(budget=60))
    assert not output.exists() or not output.read_bytes()


SAID = [{"role": "user", "content": "Why né?\u2028"}, {"role": "assistant", "content": "Because "}]
SPOKEN = [
    Prompt("text", "Why?"),
    Prompt("said", SAID),
    Prompt("more", [{"role": "user", "content": "x", "note": [1.5, None]}], 7),
]


def test_messages_are_written_as_they_are_and_completed(named, tmp_path):
    """Under the key `prompt`; a second run finds them again, and refuses others."""
    output, options = tmp_path / "out.jsonl", {"raw": False}
    result = batch(named, output, SPOKEN, **options)
    entries = {entry["id"]: entry for entry in map(json.loads, lines_of(output))}
    assert [entries[prompt.id]["prompt"] for prompt in SPOKEN] == [p.prompt for p in SPOKEN]
    assert [entries[p.id]["token_ids"] for p in SPOKEN] == [s.token_ids for s in result.sequences]
    assert batch(named, output, SPOKEN, **options) is None
    whole = lines_of(output)
    output.write_bytes(whole[0] + b"\n" + whole[1][:40])
    batch(named, output, SPOKEN, **options)
    assert sorted(lines_of(output)) == sorted(whole)
    for other in ([*SAID[:1]], [*SAID, SAID[0]], [SAID[0], SAID[1] | {"note": 1}], "Why né?"):
        with pytest.raises(UserError, match="other prompts"):
            batch(named, output, [SPOKEN[0], Prompt("said", other), SPOKEN[2]], **options)
    with pytest.raises(UserError, match="other settings"):
        batch(named, output, SPOKEN, **options, system="Be brief.")


def test_the_command_shows_and_records_what_messages_led_to(folder, tmp_path, capsys):
    """A file of texts and messages: on the screen, with statistics, a trace and a lens."""
    lines = [json.dumps({"prompt": "Why?"}) + "\n", json.dumps({"messages": SAID, "id": "said"})]
    file = written(tmp_path / "p.jsonl", lines)
    paths = [tmp_path / name for name in ("stats.json", "trace.json", "lens.html")]
    argv = ["--model", folder, "--prompt-file", file, "--max-new-tokens", 9, "--ignore-eos"]
    argv += ["--stats", paths[0], "--trace", paths[1], "--lens", paths[2], "--device", "cpu"]
    assert main([str(word) for word in argv]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("--- 1 ---\n")
    assert "--- said ---\n" in shown
    assert len(json.loads(paths[0].read_text())["sequences"]) == 2
    trace = json.loads(paths[1].read_text(encoding="utf-8"))
    assert "".join(trace["sequences"][1]["pieces"]).startswith(
        f"{tiny.START}user\nWhy né?\u2028{tiny.END}\n{tiny.START}assistant\nBecause "
    )
    assert paths[2].stat().st_size > 1000


def test_the_command_tells_the_template_whether_to_think(tmp_path, capsys):
    """--no-think puts the empty thought before the reply; a model without a switch refuses it."""
    model = tiny.folder(tmp_path / "thinks", template=tiny.THINKING)
    trace = tmp_path / "trace.json"
    argv = ["--model", model, "--prompt", "Why?", "--max-new-tokens", 2, "--trace", trace]
    asked = {}
    for option in ("--think", "--no-think", "--quiet"):
        assert main([str(word) for word in [*argv, option]]) == 0
        sequence = json.loads(trace.read_text(encoding="utf-8"))["sequences"][0]
        asked[option] = "".join(sequence["pieces"][: sequence["prompt_tokens"]])
    assert asked["--think"] == asked["--quiet"]
    assert asked["--no-think"] == asked["--think"] + "<think>\n\n</think>\n\n"
    capsys.readouterr()
    plain = tiny.folder(tmp_path / "plain")
    for model, more in ((plain, []), (tmp_path / "thinks", ["--raw"]), (plain, ["--interactive"])):
        prompt = [] if "--interactive" in more else ["--prompt", "a"]
        assert main(["--model", str(model), *prompt, "--no-think", *more]) == 2
        error = capsys.readouterr().err
        assert "think" in error
        assert len(error.splitlines()) == 1


# -- the command, killed and stopped ---------------------------------------------------------------


def words(folder, prompts, output, *more):
    argv = ["--model", folder, "--device", "cpu", "--dtype", "float32", "--raw", "--batch-size", 3]
    argv += ["--prompt-file", prompts, "--output", output, "--max-new-tokens", 150, "--seed", 1]
    argv += ["--temperature", 1, "--ignore-eos", "--budget", 40, "--interval", 5, "--lethe"]
    argv += ["--no-protect-prompt", "--num-samples", 2, *more]
    return [str(word) for word in argv]


def test_killed_and_stopped_at_any_time_no_prompt_is_lost_or_done_twice(folder, tmp_path):
    """kill -9 and Ctrl-C at random moments: whole lines each time, those written stay, and at last
    the file has the lines of an uninterrupted run, each once."""
    rng = random.Random(0)
    texts = [f"{i} " + "ab " * rng.randrange(40) for i in range(9)]
    lines = [json.dumps({"prompt": text, "max_new_tokens": 50 + i}) + "\n" for i, text in
             enumerate(texts)]  # fmt: skip
    prompts = written(tmp_path / "p.jsonl", lines)
    output, reference = tmp_path / "out.jsonl", tmp_path / "reference.jsonl"
    assert main(words(folder, prompts, reference, "--quiet")) == 0
    expected = sorted(lines_of(reference))
    assert len(expected) == 18

    before, killed = [], 0
    for signals in (signal.SIGKILL, signal.SIGINT, signal.SIGKILL):
        run = tiny.command(*words(folder, prompts, output), stderr=subprocess.DEVNULL)
        goal = len(before) + rng.randrange(1, 5)
        while run.poll() is None and (
            not output.exists() or output.read_bytes().count(b"\n") < goal
        ):
            time.sleep(0.001)
        time.sleep(rng.random() * 0.02)
        killed += run.poll() is None
        run.send_signal(signals)
        code = run.wait(timeout=60)
        assert code in (-signal.SIGKILL, 130, 0)
        data = output.read_bytes()
        now = data.split(b"\n")[:-1]
        assert data.rpartition(b"\n")[2] == b""
        assert now[: len(before)] == before
        assert set(now) <= set(expected)
        before = now
    assert killed
    assert len(before) < len(expected)
    argv = words(folder, prompts, output, "--quiet")
    assert main(argv) == 0
    assert lines_of(output)[: len(before)] == before
    assert sorted(lines_of(output)) == expected
    assert main(argv) == 0
    assert sorted(lines_of(output)) == expected


@pytest.mark.skipif(sys.platform == "win32", reason="needs a terminal of Unix")
def test_a_progress_bar_shows_speed_and_memory(folder, tmp_path):
    """On a terminal: sequences done and to do, tokens per second and KV memory, again and again
    while nothing ends; a second run counts what is missing only. With --quiet nothing at all."""
    import fcntl
    import pty
    import struct
    import termios

    texts = ["abc " * 20, "x", "yes"]
    lines = [json.dumps({"prompt": t, "max_new_tokens": n}) + "\n" for t, n in
             zip(texts, (3, 600, 600), strict=True)]  # fmt: skip
    prompts, output = written(tmp_path / "p.jsonl", lines), tmp_path / "out.jsonl"

    def screen(*more):
        ours, its = pty.openpty()
        fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("4H", 24, 120, 0, 0))
        run = tiny.command(*words(folder, prompts, output, *more), stderr=its, stdout=its)
        os.close(its)
        shown = b""
        while True:
            try:
                part = os.read(ours, 4096)
            except OSError:  # how Linux says that the other end is closed
                break
            if not part:
                break
            shown += part
        os.close(ours)
        assert run.wait() == 0
        return shown.decode()

    shown = screen()
    bars = [bar for bar in shown.split("\r") if "seq" in bar and "tokens/s, KV" in bar]
    assert any("6/6" in bar for bar in bars), shown
    assert sum("2/6" in bar for bar in bars) > 2, shown
    assert "is complete" in screen()
    kept = lines_of(output)[:4]
    output.write_bytes(b"".join(line + b"\n" for line in kept))
    assert "2/2" in screen()
    output.unlink()
    written(prompts, lines[:1])
    assert screen("--quiet") == ""


def test_only_a_pruner_needs_a_budget():
    """The cases above prune: a case without a budget has its own thresholds."""
    for name, policy in CASES.items():
        assert not isinstance(policy, Pruner) or policy.budget or name == "lethe-alone"
