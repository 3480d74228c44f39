"""benchmarks.quality.run: reading in chunks equals the engine; intervals, pairing, resuming."""

import dataclasses
import json
import random
from itertools import pairwise
from unittest import mock

import numpy as np
import pytest
import tiny
import torch
from cases import ALL, FEW
from hypothesis import example, given
from hypothesis import strategies as st

from benchmarks.common import results
from benchmarks.common.results import Lines, mean_with_interval
from benchmarks.quality import choices, foresight, own, reading
from benchmarks.quality import run as quality
from lethe_mini import FullKV, LethePlus, UserError
from lethe_mini.attention import received_mass
from lethe_mini.engine import Engine
from lethe_mini.policies import POLICIES

CLOSE = {"atol": 1e-5, "rtol": 1e-4}

# -- reading in chunks -----------------------------------------------------------------------------


def snapshot(cache):
    """Everything that a round leaves behind, copied."""
    none = torch.zeros(0)
    layers = [
        {
            "lengths": list(layer.lengths),
            "thresholds": list(layer.thresholds),
            "positions": layer.positions.clone(),
            "scores": layer.store.get("scores", none)[..., : layer.length].clone(),
            "queries": layer.queries.clone(),
            "keys": layer.keys.clone(),
            "values": layer.values.clone(),
        }
        for layer in cache.layers
    ]
    return {"seen": cache.seen[0], "layers": layers}


def by_token(model, policy, prompt, new):
    """The engine's own way: the tokens it made (but the last, which is never read), the logits
    behind the prompt and behind each of them, and what each step left."""
    logits, left = [], []
    hook = model.register_forward_hook(lambda _, args, out: logits.append(out[0, -1]))
    engine = Engine(model)
    options = {"temperature": 1.0, "on_step": lambda cache: left.append(snapshot(cache))}
    result = engine.generate([prompt], policy, max_new_tokens=new + 1, **options)
    hook.remove()
    return result.sequences[0].token_ids[:-1], torch.stack(logits), left


class Recorded(reading.Reader):
    """Keeps what every round left."""

    def __init__(self, *args):
        super().__init__(*args)
        self.left = []

    def _round(self, prefilled):
        super()._round(prefilled)
        self.left.append(snapshot(self.cache))


@pytest.mark.parametrize("policy", ALL.values(), ids=ALL)
@pytest.mark.parametrize(
    ("prompt", "interval", "chunk", "parts"),
    [(7, 3, 128, (43,)), (5, 13, 128, (43,)), (11, 17, 5, (1, 19, 2, 21))],
    ids=["short-rounds", "long-rounds", "small-chunks-in-parts"],
)
@torch.inference_mode()
def test_reading_in_chunks_is_the_engine(monkeypatch, policy, prompt, interval, chunk, parts):
    """Positions kept, scores, remembered queries, keys, values and logits are those of the engine,
    token by token: after every round, whatever ends a chunk, in how many calls the text is read."""
    monkeypatch.setattr(reading, "CHUNK", chunk)
    if policy.name != "full":
        policy = dataclasses.replace(policy, interval=interval)
    model = tiny.model(spread=1.0)
    for layer in model.layers:  # attention with preferences, but logits that stay small
        layer.self_attn.qkv_proj.weight[: 8 * 10].mul_(1.5)  # of six query and two key heads
    model.lm_head.weight.mul_(0.5)
    ids = torch.randint(256, (prompt,), generator=torch.Generator().manual_seed(3)).tolist()
    new, right, left = by_token(model, policy, ids, sum(parts))
    reader = Recorded(Engine(model), policy, prompt)
    logits = [list(reader.read(ids, last_only=True))[-1]]
    for part in parts:
        logits += reader.read(new[:part])
        new = new[part:]
    torch.testing.assert_close(torch.cat(logits), right, **CLOSE)
    left = {one["seen"]: one for one in left}
    met = 0
    for one in [*reader.left, snapshot(reader.cache)]:
        if one["seen"] == prompt:  # the engine shows its steps, not its prefill
            continue
        met += 1
        for mine, its in zip(one["layers"], left[one["seen"]]["layers"], strict=True):
            assert mine["lengths"] == its["lengths"]
            assert mine["thresholds"] == its["thresholds"]
            assert torch.equal(mine["positions"], its["positions"])
            for name in ("scores", "queries", "keys", "values"):
                torch.testing.assert_close(mine[name], its[name], **CLOSE)
    assert met == 1 + sum(parts) // reader.interval
    if getattr(policy, "budget", None):
        assert reader.cache.held < 3 * (prompt + sum(parts))
        assert reader.rounds[0][0] == prompt
        assert all(b[0] - a[0] == interval for a, b in pairwise(reader.rounds))


@FEW
@given(
    st.integers(1, 150),
    st.integers(0, 40),
    st.integers(0, 9),
    st.booleans(),
    st.integers(0, 2**32),
)
def test_weighted_mass_is_the_sum_of_weighted_queries(T, before, lag, masked, seed):
    """Query by query, whichever way the mask is given and however queries fall into blocks."""
    rng = torch.Generator().manual_seed(seed)
    S = before + T
    q, k = torch.randn(1, 6, T, 5, generator=rng), torch.randn(1, 2, S, 5, generator=rng)
    weights = torch.rand(T, 1, generator=rng)
    mask = torch.ones(T, S).tril(before).bool()[None, None] if masked else None
    right = torch.zeros(1, 2, S)
    for t in range(T):
        seen = before + t + 1
        one = received_mass(q[:, :, t : t + 1], k[:, :, :seen], None, lag)
        right[..., :seen] += weights[t] * one
    mass = received_mass(q, k, mask, lag, weights)
    torch.testing.assert_close(mass, right, atol=1e-5, rtol=1e-4)


def test_mass_is_plain_again_afterwards():
    """Also after an error: the package is not left changed."""
    plain = reading.attention.received_mass

    def fail():
        with reading.fading_mass(torch.ones(2, 1)):
            assert reading.attention.received_mass is not plain
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert reading.attention.received_mass is plain


# -- what is read ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A checkpoint folder of a tiny model whose tokens are bytes."""
    return tiny.folder(tmp_path_factory.mktemp("quality") / "model")


@pytest.fixture(scope="module")
def engine(small):
    return Engine.from_pretrained(str(small), "cpu", "float32")


@pytest.fixture(scope="module")
def prose(engine):
    return reading.token_stream(engine, "choose", 0)[:3000]


def paragraphs(texts):
    return {" ".join(p.split()) for text in texts for p in text.split("\n\n")}


def test_choosing_and_reporting_share_no_paragraph():
    """Topics repeat each other; the halves do not, and are of a size."""
    for seed in (0, 1):
        halves = [reading.split_topics(split, seed) for split in reading.SPLITS]
        assert not paragraphs(halves[0]) & paragraphs(halves[1])
        sizes = [sum(map(len, half)) for half in halves]
        assert min(sizes) > 0.6 * max(sizes)
        assert halves[0] == reading.split_topics("choose", seed)
    assert reading.split_topics("choose", 0) != reading.split_topics("choose", 1)


def test_stretches_overlap_by_what_is_predicted(engine):
    first, second = reading.stretches(engine, "choose", 0, 2, 100)
    assert len(first) == len(second) == 101
    assert first[-1] == second[0]
    with pytest.raises(UserError, match="ask for fewer"):
        reading.stretches(engine, "choose", 0, 10_000, 100)


def bench(engine, path=None, prompt=16):
    return quality.Bench(engine, Lines(path), prompt)


def arguments(*argv):
    return quality.arguments([*argv, "--prompt", "16", "--interval", "8", "--sinks", "2"])


@torch.inference_mode()
def test_prose_is_what_one_forward_says(engine, prose):
    """Full: cross-entropy of a plain forward, no gap, all agreed. With room enough every choice is
    the full cache; with little, none is."""
    ids = prose[:91]
    log_probs = engine.model(torch.tensor([ids]))[0].log_softmax(-1)
    right = -log_probs[torch.arange(16, 90), torch.tensor(ids[17:])]
    args = arguments("prose", "--budget", "90", "20", "--tokens", "90", "--protect", "no")
    args.choice.remove("snapkv")  # a window of 64 tokens has no room in 20
    args.choice.remove("pyramidkv")
    cells = quality.make_cells(args, 90)
    rows = quality.run_prose(bench(engine), cells, [ids], 7, rival="uniform")
    gaps = {(row["choice"], row["budget"]): row["gap"][0] for row in rows}
    assert rows[0]["nats"][0] == pytest.approx(right.mean().item(), abs=1e-4)
    assert rows[0]["gap"] == [0, 0, 0]
    for row in rows:
        if row["choice"] != "full":
            less = gaps[row["choice"], row["budget"]] - gaps["uniform", row["budget"]]
            assert row["over_rival"][0] == pytest.approx(less, abs=1e-9)
        if row["budget"] == "20":
            assert row["kl"][0] > 1e-3
            assert row["kept"] == pytest.approx(row["allowed"], rel=choices.TOLERANCE)
        else:
            assert row["gap"] == pytest.approx([0] * 3, abs=1e-4)
            assert row["kl"] == pytest.approx([0] * 3, abs=1e-4)
            assert row["agree"] == [1, 1, 1]


@torch.inference_mode()
def test_foresight_loses_the_least_mass(engine, prose, monkeypatch):
    """What is to come is what is received later; with room nothing is lost; after one round nobody
    who keeps as many keys per head loses less mass, in any layer."""
    monkeypatch.setattr(foresight, "squared_mass", received_mass)
    monkeypatch.setattr(foresight, "SINK", 1.0)
    ids = prose[:57]
    noted = foresight.Foretold(bench(engine), ids, 8).note(8, received_mass)
    assert list(noted) == [16, 24, 32, 40, 48, 56]
    for fade, end in ((0.0, 24), (1.0, 56)):
        for before, after, mass in zip(
            noted[16], noted[end], foresight.to_come(noted, fade)[16], strict=True
        ):
            torch.testing.assert_close(after[:, :16] - before, mass, atol=1e-5, rtol=0)
    few = {"interval": 8, "sinks": 2, "protect_prompt": False, "recent_ratio": 0.0}
    roomy = foresight.Foretold(bench(engine), ids, 8).read(foresight.Foresight(budget=60, **few))
    assert sum(roomy["kl"]) == pytest.approx(0, abs=1e-4)
    looks = torch.tensor(roomy["looks"])
    assert torch.tensor(roomy["lost"]).sum() == 0 < looks.min()
    assert sum(roomy["old_looks"]) == pytest.approx(looks.sum().item())
    one_round = foresight.Foretold(bench(engine), ids[:25], 8)
    least = one_round.read(foresight.Foresight(budget=10, **few))
    for policy in (POLICIES[name](budget=10, **few) for name in ("random", "h2o")):
        other = one_round.read(policy)
        assert other["looks"] == least["looks"]
        for best, lost in zip(least["lost"], other["lost"], strict=True):
            assert 0 < sum(best) <= sum(lost)
        assert sum(other["old_lost"]) == pytest.approx(torch.tensor(other["lost"]).sum().item())


def test_squared_mass_squares_what_each_query_gives():
    q, k = torch.randn(1, 4, 5, 8), torch.randn(1, 2, 11, 8)
    sums = torch.zeros(2, 11)
    for head in range(4):
        for t in range(5):
            seen = 11 - 5 + t + 1
            logits = k[0, head // 2, :seen] @ q[0, head, t] / 8**0.5
            sums[head // 2, :seen] += logits.softmax(-1) ** 2
    torch.testing.assert_close(foresight.squared_mass(q, k, None)[0], sums)


@torch.inference_mode()
def test_divergence_and_agreement_are_those_of_the_logits(engine, prose):
    """Against torch's own, from logits that the engine makes token by token."""
    ids = prose[:61]
    policy = LethePlus(budget=20, interval=8, sinks=2, protect_prompt=False)
    both = []
    for one in (FullKV(), policy):
        cache = engine.new_cache(one)
        cache.prompt = [16]
        engine.model(torch.tensor([ids[:16]]), cache=cache)
        if any(due := one.due(cache, True)):
            one.round(cache, due)
        logits = []
        for token in ids[16:-1]:
            one.decay(cache)
            logits.append(engine.model(torch.tensor([[token]]), cache=cache)[0, -1])
            if any(due := one.due(cache)):
                one.round(cache, due)
        both.append(torch.stack(logits))
    full, ours = both
    kl = torch.nn.functional.kl_div(
        ours.log_softmax(-1), full.log_softmax(-1), log_target=True, reduction="sum"
    )
    result = quality.Prose(bench(engine), ids, 7).read(policy)
    assert sum(result["kl"]) == pytest.approx(kl.item(), rel=1e-3)
    assert sum(result["agree"]) == (full.argmax(-1) == ours.argmax(-1)).sum()
    assert result["tokens"] == [7] * 6 + [2]
    nats = torch.nn.functional.cross_entropy(ours, torch.tensor(ids[17:]), reduction="sum")
    assert sum(result["nats"]) == pytest.approx(nats.item(), rel=1e-4)


@FEW
@given(st.integers(0, 2**32), st.integers(200, 400), st.integers(10, 90))
@example(14389874, 200, 10)  # prose with characters of several bytes, that is of several tokens
def test_a_needle_is_stated_once_behind_the_prompt(engine, prose, seed, haystack, later):
    """Places are places of tokens: a character may be several."""
    needle = quality.make_needle(engine, prose, haystack, later, 16, random.Random(seed))
    fact = engine.text.encode("The secret number of the ")
    stated, asked = places(fact, needle.ids)
    assert 16 <= stated < haystack
    question = needle.ids[asked:]
    assert places(question + needle.answer, needle.ids) == [stated]
    assert len(places(needle.answer, needle.ids)) == 1
    rest = engine.text.encode(".\n\n")
    end = stated + len(question + needle.answer + rest)
    assert needle.ids[:end][-len(rest) :] == rest
    assert needle.distance == len(needle.ids) - end >= later


def places(part, whole):
    """Where these tokens stand in a text."""
    return [i for i in range(len(whole)) if whole[i : i + len(part)] == part]


@torch.inference_mode()
def test_recall_is_the_answer_s_probability(engine, prose):
    """The product of what a plain forward gives its tokens; greedy, if each is the likeliest."""
    needle = quality.make_needle(engine, prose, 120, 30, 16, random.Random(3))
    asked = len(needle.ids)
    for answer in (needle.answer, None):
        if answer is None:  # what the model itself would write
            ids = [needle.ids]
            answer = Engine(engine.model).generate(ids, max_new_tokens=5).sequences[0].token_ids
        needle = quality.Needle(needle.ids, answer, 120, needle.distance)
        logits = engine.model(torch.tensor([needle.ids + answer]))[0, asked - 1 : -1]
        right = logits.log_softmax(-1).gather(-1, torch.tensor(answer)[:, None]).sum().exp()
        result = quality.Recall(bench(engine), needle).read(FullKV())
        assert result["probability"] == pytest.approx(right.item(), rel=1e-3)
        assert result["match"] == (logits.argmax(-1).tolist() == answer)
    assert result["match"]


# -- equal budgets, cells --------------------------------------------------------------------------


def test_budgets_are_raised_until_as_much_is_kept():
    """A breakpoint that keeps a part of the budget; and one that never keeps more than so much."""
    tried = []

    def read(policy):
        tried.append(policy.budget)
        return {"rounds": [(1000, 0.4 * policy.budget), (50, 0.4 * policy.budget)]}

    policy = LethePlus(budget=100)
    result = choices.at_equal_budget(policy, None, read)
    assert result["allowed"] == 75  # as the text had but 50 tokens at the second round
    assert result["kept"] == pytest.approx(75, rel=choices.TOLERANCE)
    assert tried == [100, 188]
    again = choices.at_equal_budget(policy, result["nominal"], read)
    assert (again, tried[2:]) == (result, [188])

    capped = choices.at_equal_budget(policy, None, lambda policy: {"rounds": [(1000, 60)]})
    assert (capped["kept"], capped["allowed"]) == (60, 100)


def test_cells_of_a_budget_too_small_say_why():
    args = arguments("prose", "--budget", "10", "50%", "--choice", "lethe-plus", "lethe", "random")
    cells = quality.make_cells(args, 200)
    assert [cell.choice for cell in cells] == ["full"] + 4 * ["lethe-plus", "lethe", "random"]
    assert [cell.policy is None for cell in cells] == [False] * 4 + [True] * 3 + [False] * 6
    assert all(cell.policy.budget == 100 for cell in cells[7:])
    rows = [{"choice": "lethe", "budget": "10", "protect": True, "error": cells[4].why}]
    assert "too small" in quality.table("prose", rows)


def test_every_choice_is_what_its_name_says():
    """The parts are varied one at a time, and none depends on a default that may change."""
    plain = choices.CHOICES["uniform"][1]
    for name, (make, changes) in choices.CHOICES.items():
        policy = make() if name == "full" else make(budget=300, protect_prompt=False, **changes)
        policy.check_prompt(0)
        if name in choices.TAKEN:
            assert all(getattr(make(budget=300), key) != value for key, value in changes.items())
        elif changes and name not in ("slow-head", "hoyer-even", "combined", "lethe-hoyer"):
            assert make is LethePlus
            assert changes.keys() == plain.keys()
            assert sum(changes[key] != plain[key] for key in plain) == (name != "uniform")


# -- intervals -------------------------------------------------------------------------------------

numbers = st.lists(st.floats(-5, 5), min_size=2, max_size=31)


@FEW
@given(numbers, st.floats(-3, 3), st.floats(0.1, 9))
def test_intervals_move_and_stretch_with_what_is_measured(values, shift, scale):
    ones = [1] * len(values)
    mean, low, high = mean_with_interval(values, ones)
    assert mean == pytest.approx(sum(values) / len(values), abs=1e-9)
    assert low - 1e-9 <= mean_with_interval(values[::-1], ones)[0] <= high + 1e-9
    moved = mean_with_interval([shift + scale * value for value in values], ones)
    assert moved == pytest.approx([shift + scale * x for x in (mean, low, high)], abs=1e-6)


def test_intervals_cover_the_truth_as_often_as_they_say(monkeypatch):
    """Blocks of 9 equal items: drawn by block 95 % hold the truth, drawn by item far fewer."""
    monkeypatch.setattr(results, "DRAWS", 1000)
    rng = torch.Generator().manual_seed(0)
    by_block = by_item = 0
    for _ in range(100):
        blocks = torch.randn(41, generator=rng)
        _, low, high = mean_with_interval(9 * blocks, [9] * 41)
        by_block += low <= 0 <= high
        _, low, high = mean_with_interval(blocks.repeat_interleave(9), [1] * 369)
        by_item += low <= 0 <= high
    assert 88 <= by_block <= 99
    assert by_item <= 60


def test_pairs_differ_by_what_differs():
    """What two choices share, however noisy, is no uncertainty of their difference."""
    noise = torch.randn(43).tolist()
    full = {"nats": noise, "tokens": [7] * 43}
    mine = {"nats": [x + 7 * 0.25 for x in noise], "tokens": [7] * 43}
    assert quality.difference(mine, full, "nats") == pytest.approx([0.25] * 3)
    _, low, high = mean_with_interval(noise, [7] * 43)
    assert high - low > 0.05
    assert quality.difference(full, full, "nats") == [0, 0, 0]
    with pytest.raises(ValueError, match="longer"):
        quality.difference({**mine, "nats": noise[1:]}, full, "nats")


# -- going on --------------------------------------------------------------------------------------


def test_lines_are_found_again_and_a_torn_one_is_not(tmp_path):
    path = tmp_path / "lines.jsonl"
    lines = Lines(path)
    lines.put({"a": 1, "b": [2, 3]}, {"x": 0.1})
    lines.put({"a": 2}, {"x": 0.2})
    with path.open("a") as file:
        file.write('{"key": {"a": 3}, "resu')
    again = Lines(path)
    assert again.get({"b": [2, 3], "a": 1}) == {"x": 0.1}
    assert again.get({"a": 3}) is None
    again.put({"a": 3}, {"x": 0.3})
    entries = [json.loads(line)["result"]["x"] for line in path.read_text().splitlines()]
    assert entries == [0.1, 0.2, 0.3]


# -- the model's own chains ------------------------------------------------------------------------


@pytest.fixture
def problems(tmp_path):
    path = tmp_path / "problems.jsonl"
    lines = [{"prompt": f"Say {n}. " * (n % 3 + 1), "answer": str(n)} for n in range(8)]
    path.write_text("\n".join(map(json.dumps, lines)))
    return str(path)


def test_halves_of_a_file_share_no_problem(problems):
    first, second = (own.load(problems, split, 0, 9) for split in reading.SPLITS)
    assert len(first) == len(second) == 4
    assert not {*first} & {*second}
    assert own.load(problems, "choose", 0, 2) == first[:2]


def test_chains_are_what_the_engine_writes_and_are_written_once(engine, problems, tmp_path):
    prompts, lines = own.load(problems, "report", 0, 9), Lines(tmp_path / "lines.jsonl")
    chains = own.write(engine, prompts, lines, 12, 3, "weights")
    for prompt, chain in zip(prompts, chains, strict=True):
        alone = engine.generate([prompt], max_new_tokens=12).sequences[0]
        assert chain == own.Chain(engine.text.encode_prompt(prompt), alone.token_ids)
    with mock.patch.object(Engine, "generate", side_effect=AssertionError):
        assert own.write(engine, prompts, lines, 12, 3, "weights") == chains


def test_texts_are_whole_problems_behind_one_another():
    chains = [own.Chain([1, 2], [3, 4, 5]), own.Chain([6], [7]), own.Chain([8], [9, 9])]
    one, *others = own.joined(chains, 6)
    assert one == own.Text([1, 2, 3, 4, 5, 6, 7], [False] * 2 + [True] * 3 + [False, True], 2)
    assert not others  # what is left is too short
    assert own.alone(chains, 4) == [own.Text([1, 2, 3, 4, 5], [False] * 2 + [True] * 3, 2)]


@torch.inference_mode()
def test_only_what_the_model_wrote_counts(engine, prose):
    """Sums over its tokens, of the same log-probabilities as those of all tokens."""
    text = own.Text(prose[:61], [n >= 20 and n % 3 == 0 for n in range(61)], 16)
    policy = LethePlus(budget=20, interval=8, sinks=2, protect_prompt=False)
    every = quality.Prose(bench(engine), text.ids, 1).read(policy)
    mine = quality.Own(bench(engine), text, 7).read(policy)
    places = [n - 17 for n in range(17, 61) if text.own[n]]
    assert mine["tokens"] == [7, 7]
    for name in ("nats", "kl", "agree"):
        assert sum(mine[name]) == pytest.approx(sum(every[name][n] for n in places))


@torch.inference_mode()
def test_where_attention_is_lost(engine, prose, monkeypatch):
    """In the model's own chains too: what has been looked at does not depend on the policy, also of
    one whose looks end chunks earlier; the tables say the shares."""
    monkeypatch.setattr(foresight, "LOOK", 4)
    text = own.Text(prose[:57], [n % 3 == 0 for n in range(57)], 17)
    common = {"budget": 12, "interval": 8, "sinks": 2, "protect_prompt": False}
    policies = [POLICIES["random"](**common), POLICIES["recall"](**common, window=4)]
    one = foresight.ForetoldOwn(bench(engine), text, 8)
    assert "looks" not in one.read(FullKV())
    results = [one.read(policy) for policy in policies]
    oracle = one.read(foresight.Foresight(**common, recent_ratio=0.0, fade=1.0))
    assert torch.tensor(oracle["looks"]).sum() == pytest.approx(
        torch.tensor(results[0]["looks"]).sum()
    )
    plain = quality.Own(bench(engine), text, 8).read(policies[1])
    assert {name: results[1][name] for name in plain} == plain
    for name in ("looks", "old_looks"):
        first, second = (torch.tensor(result[name]) for result in results)
        torch.testing.assert_close(first, second)
        lost = torch.tensor(results[0][name.replace("looks", "lost")])
        assert (lost <= first).all()
        assert lost.sum() > 0
    cells = [choices.Cell(p.name, "12", False, p) for p in policies]
    lines = foresight.lost_tables(cells, [[result] for result in results]).splitlines()
    layers = engine.model.config.num_hidden_layers
    shares = [float(line.split("|")[2]) for line in lines[2 : layers + 2]]
    assert sum(shares) == pytest.approx(100, abs=0.5)
    assert lines[layers + 5].startswith("| 0 to 128 | 100.0 | ")
    looks, lost = (torch.tensor(results[1][name])[-1].sum() for name in ("looks", "lost"))
    assert lines[layers + 1].endswith(f"| {100 * lost / looks:.1f} |")


@pytest.mark.parametrize("source", ["prose", "own"])
def test_the_command_line_of_foresight(small, tmp_path, capsys, source, problems):
    """From a checkpoint folder: three tables, and JSON with what each KV head lost."""
    path = tmp_path / "out.json"
    more = ["--own", problems, "--count", "4", "--tokens", "150"] if source == "own" else []
    more = more or ["--tokens", "256"]
    common = ["--model", str(small), "--texts", "1", "--budget", "25%", "--fade", "1"]
    with mock.patch.object(foresight.own, "write", wordy):
        foresight.main([*common, *more, "--choice", "random", "recall", "--json", str(path)])
    out, facts = capsys.readouterr().out, json.loads(path.read_text())
    assert [row["choice"] for row in facts["rows"]] == ["full", "random", "recall", "foresight 1"]
    assert out.count("| of all looks | random 25% | recall 25% | foresight 1 25% |") == 2
    assert np.shape(facts["lost"][0][0]["looks"]) == (3, 2)  # layers, KV heads
    assert len(facts["lost"]) == 3
    for wrong in (["--interval", "33"], ["--tokens", "100"]):
        with pytest.raises(SystemExit):
            foresight.main([*common, *wrong])


def wordy(engine, prompts, *_):
    """In place of own.write: an untrained model stops at random."""
    asked = [engine.text.encode_prompt(prompt) for prompt in prompts]
    return [own.Chain(ids, [(7 * n) % 90 + 3 for n in range(100)]) for ids in asked]


@pytest.mark.parametrize("task", ["prose", "needle"])
def test_an_interrupted_run_goes_on_and_ends_the_same(engine, tmp_path, monkeypatch, task):
    """Nothing is read twice, and the rows are those of a run in one go."""
    sizes = {
        "prose": ["--texts", "2", "--tokens", "90", "--block", "7"],
        "needle": ["--needles", "2", "--haystack", "120", "--later", "30"],
    }
    few = ["--choice", "random", "lethe-plus", "lethe", "--budget", "25", "--protect", "no"]
    args = arguments(task, *sizes[task], *few)
    whole = quality.run(engine, args)
    calls = []

    class Breaking(reading.Reader):
        def __init__(self, engine, policy, prompt):
            calls.append(policy)
            if len(calls) == 6:
                raise KeyboardInterrupt
            super().__init__(engine, policy, prompt)

    args.lines = tmp_path / "lines.jsonl"
    monkeypatch.setattr(quality, "Reader", Breaking)
    with pytest.raises(KeyboardInterrupt):
        quality.run(engine, args)
    done = len(args.lines.read_text().splitlines())
    assert 0 < done < 2 * 3
    assert quality.run(engine, args) == whole
    before = len(calls)
    assert quality.run(engine, args) == whole
    assert len(calls) == before
    assert len(args.lines.read_text().splitlines()) >= 2 * 3


@pytest.mark.parametrize("task", ["prose", "needle", "own"])
def test_the_command_line(small, tmp_path, capsys, task, problems):
    """A quick run from a checkpoint folder: a table, and JSON with every setting."""
    path = tmp_path / "out.json"
    more = ["--problems", problems] if task == "own" else []
    quality.main(
        [task, "--model", str(small), "--quick", "--json", str(path), "--device", "cpu", *more]
    )
    out = capsys.readouterr().out
    facts = json.loads(path.read_text())
    assert facts["settings"]["choice"] == quality.QUICK_CHOICES
    assert len(facts["rows"]) == 1 + 2 * len(quality.QUICK_CHOICES)
    assert out.count("\n|") == 2 + len(facts["rows"])
    assert facts["rows"][1]["policy"]["name"] == "random"
    for wrong in (["--budget", "half"], ["--texts", "no"] if more else ["--prompt", "0"]):
        with pytest.raises(SystemExit):
            quality.main([task, *wrong])
    with pytest.raises(SystemExit, match="no such folder"):
        quality.main([task, "--model", "./nowhere"])
