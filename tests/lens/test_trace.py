"""A trace tells what the cache held: replayed, it gives every position at every round.

The policies, and caches of noise to try them on, are those of tests/laws, where the law of replay
stands, too.
"""

import copy
import dataclasses
import json
import math
from types import SimpleNamespace

import numpy as np
import oracles
import pytest
import tiny
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from noise import feed, held_positions, new_cache, seeds
from small_policies import our_cases
from traces import synthetic

from lethe_mini import FullKV, Lethe, LethePlus, Policy, UserError
from lethe_mini.app import cli
from lethe_mini.lens.replay import pack, positions_of, replay, runs, scored, unpack
from lethe_mini.lens.trace import VERSION, Trace
from lethe_mini.policies import H2O, RandomKV

every_policy = pytest.mark.parametrize("policy", our_cases().values(), ids=our_cases())


def begun(policy, prompts, samples=1):
    """A trace as it is when a run of a model of three layers of two heads begins."""
    config = SimpleNamespace(num_hidden_layers=3, num_key_value_heads=2)
    engine = SimpleNamespace(model=SimpleNamespace(config=config), text=None, name="noise")
    trace = Trace()
    trace.begin(engine, policy, [list(range(n)) for n in prompts], samples, 0)
    return trace


def lists(held):
    return [[head.tolist() for head in layer] for layer in held]


def finished(tokens):
    return SimpleNamespace(token_ids=[0] * tokens, finish_reason="length")


@pytest.fixture(scope="module")
def engine():
    return tiny.engine()


def spied(policy):
    """The same policy, and what it finds and leaves: {(prompt, seen): [before, after, facts]}."""
    notes, facts = {}, [None, None]  # facts: of the round, as they are when it divides

    class Spy(type(policy)):
        def shares(self, cache, rows, sparsity):
            facts[0] = super().shares(cache, list(range(len(cache.seen))), sparsity).tolist()
            facts[1] = []
            for layer in cache.layers:
                importance = self.importance(layer, cache)
                counts = self.salient(importance, layer, torch.arange(len(layer.lengths)))
                counts = layer.lengths if counts is None else counts.tolist()
                facts[1].append([importance.tolist(), counts])
            return super().shares(cache, rows, sparsity)

        def round(self, cache, due):
            before, facts[:] = held_positions(cache), [None, None]
            scores = [layer.scores.tolist() if self.scored else None for layer in cache.layers]
            done = super().round(cache, due)
            after = held_positions(cache)
            for row, ready in enumerate(due):
                if ready:
                    key = cache.prompt[row], cache.seen[row]
                    both = [[layer[row] for layer in held] for held in (before, after)]
                    notes[key] = SimpleNamespace(
                        held=both, row=row, facts=list(facts), scores=scores
                    )
            return done

    spy = Spy(**{spec.name: getattr(policy, spec.name) for spec in dataclasses.fields(policy)})
    return spy, notes


@every_policy
@settings(max_examples=4)
@given(
    prompts=st.lists(st.integers(1, 13), min_size=1, max_size=4, unique=True),
    limits=st.lists(st.integers(1, 60), min_size=4, max_size=4),
    batch_size=st.integers(1, 4),
    chunk=st.integers(1, 20),
    compact=st.booleans(),
    seed=seeds,
)
def test_a_runs_trace_is_what_its_policy_saw_and_left(
    engine, policy, prompts, limits, batch_size, chunk, compact, seed
):
    """Of sequences that join and leave at any time; read back from its file; positions exactly,
    shares and breakpoints too, Hoyer and scores as closely as they are packed."""
    spy, notes = spied(policy)
    chance = torch.Generator().manual_seed(seed)
    ids = [torch.randint(250, (n,), generator=chance).tolist() for n in prompts]
    trace = Trace()
    result = engine.generate(
        ids, spy, limits[: len(ids)], batch_size=batch_size, prefill_chunk=chunk,
        positions="compact" if compact else "absolute", trace=trace,
    )  # fmt: skip
    data = json.loads(json.dumps(trace.data))
    told = set()
    for index, (one, generated) in enumerate(zip(data["sequences"], result.sequences, strict=True)):
        assert one["token_ids"] == ids[index] + generated.token_ids
        assert one["read"] == len(one["token_ids"]) - 1
        assert one["finish_reason"] == generated.finish_reason
        held, seen = [[[]] * 2] * 3, 0
        for record, before, after in replay(data, index):
            key = one["prompt_tokens"], record["seen"]
            told.add(key)
            note, held, seen = notes[key], after, record["seen"]
            assert [lists(before), lists(after)] == note.held
            check_facts(policy, record, before, note)
        grown = one["read"] - seen
        assert result.stats.kv_tokens_final[index] == [len(layer[0]) + grown for layer in held]
    assert told == notes.keys()


def check_facts(policy, record, before, note):
    for layer, heads in enumerate(before):
        n = len(heads[0])
        if note.scores[layer] is None:
            assert "hoyer" not in record
        else:
            rows = [head[:n] for head in note.scores[layer][note.row]]
            if isinstance(policy, Lethe) and not getattr(policy, "per_head", False):
                rows = [[sum(column) for column in zip(*rows, strict=True)]]
            right = sum(map(oracles.hoyer, rows)) / len(rows)
            assert record["hoyer"][layer] == pytest.approx(right, abs=2e-4)
        shares, salient = note.facts
        share = shares[layer][note.row]
        assert record.get("budget", [None] * 3)[layer] == (share if policy.budget else None)
        importance, counts = salient[layer]
        found = counts[note.row] if counts[note.row] < n else None
        assert record.get("breakpoint", [None] * 3)[layer] == found
        mean = {}
        rows = importance[note.row] * (1 if len(importance[note.row]) == len(heads) else len(heads))
        for head, values in zip(heads, rows, strict=True):
            for position, value in zip(head.tolist(), values[:n], strict=True):
                mean.setdefault(position, []).append(value)
        positions, scores = scored(record, layer, heads)
        assert positions.tolist() == sorted(mean)
        for position, score in zip(positions.tolist(), scores.tolist(), strict=True):
            right = sum(mean[position]) / len(mean[position])
            low, high = record["low"][layer], record["high"][layer]
            if low is None:
                assert score == pytest.approx(right, rel=0.045, abs=high * 1e-9)
            else:
                assert score == pytest.approx(right, abs=(high - low) / 500 + 1e-5 * abs(high))


@pytest.mark.parametrize("batch_size", [1, 2, 4, 9])
def test_samples_share_the_round_after_their_prompt(engine, batch_size):
    policy = RandomKV(budget=11, interval=4, protect_prompt=False)
    trace = Trace()
    result = engine.generate(
        [list(range(23)), list(range(7))], policy, 9, temperature=1.0, num_samples=4,
        batch_size=batch_size, trace=trace,
    )  # fmt: skip
    sequences = trace.data["sequences"]
    assert [(one["prompt"], one["sample"]) for one in sequences] == [
        (prompt, sample) for prompt in range(2) for sample in range(4)
    ]
    first = [one["rounds"][0] for one in sequences[:4]]
    assert [record["seen"] for record in first] == [23] * 4
    assert all(record == first[0] for record in first)
    assert len({tuple(one["token_ids"]) for one in sequences}) > 4
    for index, one in enumerate(sequences):
        *_, (record, _, held) = replay(trace.data, index)
        grown = one["read"] - record["seen"]
        assert [len(layer[0]) + grown for layer in held] == result.stats.kv_tokens_final[index]


@pytest.mark.parametrize(
    "policy",
    [Lethe(budget=14, interval=4), LethePlus(budget=14, interval=4), H2O(budget=14, interval=4)],
)
def test_a_trace_changes_no_token(engine, policy):
    prompts = [[1, 2, 3], list(range(9))]
    plain = engine.generate(prompts, policy, 30)
    traced = engine.generate(prompts, policy, 30, trace=Trace())
    assert plain.sequences == traced.sequences


@pytest.mark.parametrize("after", [0, 1, 7, 40])
def test_an_interrupted_run_leaves_a_whole_trace(engine, tmp_path, after):
    told = []

    def on_token(*what):
        told.append(what)
        if len(told) > after:
            raise KeyboardInterrupt

    trace = Trace()
    result = engine.generate(
        [list(range(23)), [1], [2]], RandomKV(budget=9, interval=2, protect_prompt=False), 60,
        batch_size=2, on_token=on_token, trace=trace,
    )  # fmt: skip
    trace.write(tmp_path / "trace.json")
    again = Trace.read(tmp_path / "trace.json").data["sequences"]
    assert [one["finish_reason"] for one in again] == ["interrupted"] * 3
    for one, generated in zip(again, result.sequences, strict=True):
        assert one["token_ids"][one["prompt_tokens"] :] == generated.token_ids
    assert again[2]["read"] == 0
    assert again[2]["rounds"] == []


def test_an_interrupted_round_is_no_round(engine):
    class Stopped(RandomKV):
        def round(self, cache, due):
            if cache.seen[0] > 20:
                raise KeyboardInterrupt
            return super().round(cache, due)

    trace = Trace()
    engine.generate([[1, 2, 3]], Stopped(budget=9, interval=2), 60, trace=trace)
    rounds = trace.data["sequences"][0]["rounds"]
    assert rounds
    assert rounds[-1]["seen"] <= 20
    list(replay(trace.data, 0))


def test_a_policy_that_only_has_rounds_is_traced(engine, tmp_path):
    """The protocol asks no more of a policy than `due` and `round`."""

    @dataclasses.dataclass(frozen=True)
    class Alternate(Policy):
        name = "alternate"
        reach: float = math.inf

        def due(self, cache, prefilled=False):
            return [seen % 5 == 0 for seen in cache.seen]

        def round(self, cache, due):
            for layer in cache.layers:
                layer.evict([0], *tiny.mask_of([[range(0, layer.length, 2)]]))

    trace = Trace()
    engine.generate([[1, 2, 3]], Alternate(), 20, trace=trace)
    trace.write(tmp_path / "trace.json")
    data = Trace.read(tmp_path / "trace.json").data
    assert data["policy"] == {"name": "alternate", "reach": "inf"}
    assert data["sequences"][0]["rounds"][0].keys() == {"seen", "dropped"}
    _, _, held = next(replay(data, 0))
    assert lists(held) == [[[0, 2, 4]] * 2] * 3


def test_a_score_that_is_no_number_is_traced_as_none(tmp_path):
    """Half precision can overflow; the trace must stay JSON."""
    policy = H2O(budget=6, interval=1)
    trace, cache = begun(policy, [3]), new_cache(policy, 3)
    feed(cache, 9)
    cache.layers[1].scores[0, 0, 4] = math.nan
    cache.layers[2].scores[0, 1, 4] = math.inf
    trace.round_begins(cache)
    trace.round_ends(cache, [True], [0], policy.round(cache, [True]))
    trace.ends(0, 9, finished(6))
    trace.write(tmp_path / "trace.json")
    data = Trace.read(tmp_path / "trace.json").data
    ((record, before, _),) = replay(data, 0)
    assert all(map(math.isfinite, record["hoyer"]))
    for layer in (1, 2):
        assert scored(record, layer, before[layer])[1][4] == 0


# -- packing -------------------------------------------------------------------------------------


@given(st.sets(st.integers(0, 300)))
def test_positions_pack_and_unpack(positions):
    packed = runs(np.array(sorted(positions), dtype=int))
    assert positions_of(packed).tolist() == sorted(positions)
    assert len(packed) == 2 * sum(p - 1 not in positions for p in positions)


numbers = st.floats(width=32, allow_nan=True, allow_infinity=True)


@given(st.lists(numbers | st.floats(0, 100, width=32), min_size=1, max_size=30))
@example([0.0])
@example([math.nan])
@example([-math.inf, -1.0, 2.0])
@example([1e-30, 1e30])
def test_scores_pack_and_unpack(values):
    packed, low, high = pack(np.array(values, np.float32))
    json.dumps([low, high], allow_nan=False)
    unpacked = unpack(packed, low, high)
    known = [value for value in values if math.isfinite(value)]
    for value, got in zip(values, unpacked.tolist(), strict=True):
        if not math.isfinite(value):
            assert got == 0 or math.isnan(got)
        elif min(known) >= 0:
            assert got == pytest.approx(value, rel=0.045, abs=max(known) * 1e-9)
        else:
            reach = max(known) - min(known)
            assert got == pytest.approx(value, abs=reach / 500 + 1e-5 * max(map(abs, known)))


@pytest.mark.parametrize("alike", [True, False])
def test_ten_thousand_tokens_of_thirty_layers_fit_in_20_megabytes(tmp_path, alike):
    trace = synthetic(10_000, 30, heads=3, alike=alike)
    trace.write(tmp_path / "trace.json")
    assert (tmp_path / "trace.json").stat().st_size < 20e6
    assert Trace.read(tmp_path / "trace.json").data == trace.data


# -- what is refused -----------------------------------------------------------------------------


def test_a_trace_is_of_one_run(engine):
    trace = Trace()
    engine.generate([[1, 2]], max_new_tokens=3, trace=trace)
    before = copy.deepcopy(trace.data)
    with pytest.raises(UserError, match="holds a run already"):
        engine.generate([[1, 2]], max_new_tokens=3, trace=trace)
    assert trace.data == before
    cache = engine.new_cache(FullKV())
    engine.generate([[1, 2]], max_new_tokens=3, cache=cache, trace=Trace())
    with pytest.raises(UserError, match="empty cache"):
        engine.generate([[1, 2]], max_new_tokens=3, cache=cache, trace=Trace())


@pytest.fixture(scope="module")
def small(engine):
    """A small trace: its text, as in a file."""
    trace = Trace()
    policy = LethePlus(budget=12, interval=3, breakpoint="global", tau=1.5)
    engine.generate([[5, 6, 7], [8]], policy, 25, trace=trace)
    return json.dumps(trace.data)


def refused(path, match):
    with pytest.raises(UserError, match=match) as info:
        Trace.read(path)
    assert "\n" not in str(info.value)
    assert str(path) in str(info.value)


def test_files_that_are_no_traces_are_refused(tmp_path, small):
    path = tmp_path / "trace.json"
    refused(path, "cannot read .*No such file")
    refused(tmp_path, "cannot read")
    for text in ("", "{", small[:-9], "[" * 100_000, "\ufeff" + small):
        path.write_text(text, encoding="utf-8")
        refused(path, "is not JSON")
    path.write_bytes(b"\xff\xfe")
    refused(path, "is not JSON")
    for data in ([], 3, None, {}, {"format": "another"}):
        path.write_text(json.dumps(data))
        refused(path, "is no trace")
    for version in (0, VERSION + 1, None, "1\n2"):
        path.write_text(json.dumps({**json.loads(small), "version": version}))
        refused(path, "has version .* not 1")
    for option in (["x"], {}, float("nan")):
        data = json.loads(small)
        data["policy"]["tau"] = option
        path.write_text(json.dumps(data))
        refused(path, "damaged")


def places(data, path=()):
    """Every place in nested lists and dictionaries."""
    yield path
    items = data.items() if isinstance(data, dict) else ()
    for key, value in enumerate(data) if isinstance(data, list) else items:
        yield from places(value, (*path, key))


JUNK = [None, -1, 10**12, 1.5, "x", "AAAA", [], [[]], [1, 2], {}, True]


def test_a_damaged_trace_is_refused_or_harmless(tmp_path, small):
    """Whatever stands in any one place: one line, or a trace that replays."""
    path = tmp_path / "trace.json"
    spots = list(places(json.loads(small)))
    chance, lines = np.random.default_rng(0), set()
    for spot in [spots[i] for i in chance.choice(len(spots), 250)] + spots[:40]:
        data = json.loads(small)
        if not spot:
            continue
        owner = data
        for key in spot[:-1]:
            owner = owner[key]
        junk = JUNK[chance.integers(len(JUNK))]
        if isinstance(owner, dict) and chance.random() < 0.3:
            del owner[spot[-1]]
        else:
            owner[spot[-1]] = junk
        path.write_text(json.dumps(data))
        try:
            trace = Trace.read(path)
        except UserError as error:
            lines.add(str(error).count("\n"))
            continue
        for index in range(len(trace.data["sequences"])):
            for record, before, _ in replay(trace.data, index):
                for layer, heads in enumerate(before):
                    if "scores" in record:
                        scored(record, layer, heads)
    assert lines == {0}


# -- the command line ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.folder(tmp_path_factory.mktemp("checkpoint") / "model")


RUN = ["--raw", "--prompt", "abcdef", "--max-new-tokens", "24", "--ignore-eos", "--quiet"]
PRUNE = ["--lethe", "--budget", "12", "--interval", "4"]


def test_the_command_line_writes_a_trace_and_a_lens(model, tmp_path, capsys):
    files = [tmp_path / name for name in ("t.json", "l.html", "s.json")]
    options = [f"--{name}={path}" for name, path in zip(("trace", "lens", "stats"), files)]  # noqa: B905
    assert cli.main(["--model", str(model), *RUN, *PRUNE, *options]) == 0
    data, stats = Trace.read(files[0]).data, json.loads(files[2].read_text())
    (one,) = data["sequences"]
    assert data["policy"] == stats["policy"]
    assert one["pieces"][:6] == list("abcdef")
    shown = [piece for piece in one["pieces"][6:] if piece not in (tiny.START, tiny.END)]
    assert "".join(shown) == stats["sequences"][0]["text"]
    assert len(one["rounds"]) == stats["rounds"] > 2
    assert files[1].read_text(encoding="utf-8").startswith("<!doctype html>")
    capsys.readouterr()


def test_pieces_name_special_tokens_and_finish_characters(model):
    from lethe_mini.checkpoint.text import Text

    text = Text(model)
    ids = text.encode("<|start|>a\u20ac") + text.encode("\u20ac")[:2]
    assert text.pieces(ids) == ["<|start|>", "a", "", "", "\u20ac", "", "\ufffd"]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (["--trace", "none/t.json"], "cannot write none/t.json"),
        (["--lens", "."], "cannot write ."),
        (["--trace", "x", "--lens", "x"], "x is named twice"),
        (["--trace", "x", "--stats", "x"], "x is named twice"),
        (["--trace", "x", "--output", "y"], "leave out --trace"),
        (["--lens", "x", "--output", "y"], "leave out --trace"),
        (["--lens", "x", "--interactive"], "leave out"),
    ],
)
def test_mistakes_are_found_before_a_model_is_loaded(tmp_path, monkeypatch, capsys, options, match):
    monkeypatch.chdir(tmp_path)
    run = ["--model", "no-such-folder/x", *(["--quiet"] if "--interactive" in options else RUN)]
    assert cli.main([*run, *options]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert match in err
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_fails_leaves_an_older_trace(tmp_path, capsys):
    (tmp_path / "t.json").write_text("older")
    argv = ["--model", str(tmp_path), *RUN, "--trace", str(tmp_path / "t.json")]
    assert cli.main(argv) == 2
    assert (tmp_path / "t.json").read_text() == "older"
    capsys.readouterr()
