"""benchmarks.accuracy: what counts as an answer, which answers are right, and that neither
interruptions nor batches nor the order of problems change a text or a grade."""

import json
import signal

import pytest
import tiny

from benchmarks.accuracy import grading, problems
from benchmarks.accuracy import run as accuracy
from benchmarks.accuracy.grading import extract
from benchmarks.accuracy.problems import Problem, from_file, make
from benchmarks.common.results import Lines
from lethe_mini import FullKV
from lethe_mini.engine import Engine
from lethe_mini.errors import UserError

# -- what is the answer ----------------------------------------------------------------------------

BOXES = [
    (r"so \boxed{42}.", r"\boxed{42}"),
    (r"\boxed{1} no, \boxed{2}", r"\boxed{2}"),
    (r"\boxed{\frac{1}{2}} it is", r"\boxed{\frac{1}{2}}"),
    (r"\boxed{\{1,2\}}", r"\boxed{\{1,2\}}"),
    (r"\boxed{\left\{ 1 \right.}", r"\boxed{\left\{ 1 \right.}"),
    (r"\boxed{\boxed{3}}", r"\boxed{3}"),
    (r"\fbox{no} \boxed {7}", r"\boxed{7}"),
    ("\\boxed{a\nb}", "\\boxed{a\nb}"),
    (r"\boxed{5} and I put it within \boxed{}", r"\boxed{5}"),
    (r"} \boxed{6}", r"\boxed{6}"),
    (r"{ \boxed{6}", r"\boxed{6}"),
    (r"\boxed{8} then \boxed{9", r"\boxed{8}"),
    (r"\boxed{4 and \boxed{5}", r"\boxed{5}"),
    (r"<think>\boxed{1}</think> \boxed{2}", r"\boxed{2}"),
]


@pytest.mark.parametrize(("text", "answer"), BOXES)
@pytest.mark.parametrize("ended", [False, True])
def test_the_last_closed_box_is_the_answer(text, answer, ended):
    assert extract("math", text, ended) == answer
    assert extract("gym", text, ended) == answer.removeprefix("\\boxed{")[:-1]


@pytest.mark.parametrize("kind", ["math", "gym"])
@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("I think\nthe answer is 4.\n\n", "the answer is 4."),
        ("<think>5\n</think>\n\n 6 ", "6"),
        ("<think>5\n</think>\n", None),
        ("", None),
        (" \n ", None),
    ],
)
def test_without_a_mark_the_last_line_of_a_text_that_ended(kind, text, line):
    assert extract(kind, text, True) == line
    assert extract(kind, text, False) is None


def test_what_stands_in_the_last_answer_tags_goes_before_a_box():
    text = r"<answer>1</answer> <answer>" + "\nup\nleft </answer> \\boxed{3}"
    assert extract("gym", text, False) == "up\nleft"
    assert extract("gym", r"<answer>1 \boxed{3}", False) == "3"
    assert extract("gym", "I use <answer> tags: <answer>4</answer> done </answer>", False) == "4"


LETTERS = [
    (r"\boxed{B}", "B"),
    (r"\boxed{(B)}", "B"),
    (r"\boxed{\text{B}}", "B"),
    (r"\boxed{\textbf{(B)}}", "B"),
    (r"\boxed{\mathrm{B}}", "B"),
    (r"\boxed{B. Paris}", "B"),
    (r"\boxed{b}", "B"),
    (r"$\boxed{ B }$", "B"),
    ("Answer: B", "B"),
    ("**Answer:** B", "B"),
    ("**Answer: B**", "B"),
    ("Answer: (B)", "B"),
    (r"Answer: \text{B}", "B"),
    (r"Answer: $\boxed{B}$", "B"),
    ("The correct answer is B, since", "B"),
    ("The final answer is **B**.", "B"),
    (r"\boxed{A} ... Answer: B", "B"),
    (r"Answer: A ... \boxed{B}", "B"),
    (r"\boxed{B} which is \boxed{30}", "B"),
    ("Answer: Both", None),
    ("The answer is a number", None),
    ("Answer: E", None),
    (r"\boxed{E}", None),
    (r"\boxed{A and B}", None),
    (r"\boxed{Apple}", None),
    (r"\boxed{2}", None),
    ("I like B", None),
]


@pytest.mark.parametrize(("text", "answer"), LETTERS)
def test_the_last_letter_that_is_boxed_or_called_the_answer(text, answer):
    assert extract("letter", text, False, 4) == answer
    assert extract("letter", f"<think>Answer: D</think>{text}\n", True, 4) == (answer or "D")


@pytest.mark.parametrize(
    ("line", "answer"), [("B", "B"), ("(C)", "C"), ("B. Paris", "B"), ("x", None)]
)
def test_a_letter_alone_in_the_last_line_of_a_text_that_ended(line, answer):
    assert extract("letter", f"Well.\n{line}", True, 4) == answer
    assert extract("letter", f"Well.\n{line}", False, 4) is None


def test_a_text_that_opens_boxes_for_ever_is_read_once():
    assert extract("math", "\\boxed{" * 200_000, False) is None
    assert extract("letter", "\\boxed{" * 200_000 + "Answer: " * 50_000, True, 4) is None


# -- is it right -----------------------------------------------------------------------------------

RIGHT = [
    ("5", "5"),
    (r"\frac{1}{2}", "0.5"),
    (r"\frac{3}{56}", "3/56"),
    (r"\dfrac{1}{2}", r"\frac12"),
    (r"\sqrt{50}", r"5\sqrt{2}"),
    ("p - q", "-q+p"),
    ("6+9i", "9i + 6"),
    (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\pi/2)"),
    ("1,-2", "-2, 1"),
    (r"\{1,2\}", r"\{2,1\}"),
    (r"10\%", "0.1"),
    (r"\$32,\!348", "32348"),
    ("32,348", "32348"),
    ("x=5", "5"),
    (r"90^\circ", "90"),
    (r"5.4 \text{ cents}", "5.4"),
    (r"\text{Evelyn}", "Evelyn"),
    ("east", r"\text{East}"),
    (r"\text{(C)}", "C"),
    ("Paris", "Paris."),
    (r"$\frac{1}{2}$", r"\frac{1}{2}"),
    (r"The result is $x^2$.", "x^2"),
    ("0.0000001", "1/10000000"),
]
WRONG = [
    ("5", "-5"),
    ("2", "3"),
    ("p-q", "q-p"),
    ("(2,3)", "(3,2)"),
    ("[0,1)", "[0,1]"),
    ("Paris", "Pairs"),
    ("True", "False"),
    ("5", "no idea"),
    ("5", r"\frac{1}{"),
    ("5", "\\"),
]


@pytest.fixture(scope="module")
def grader():
    with grading.Grader() as one:
        yield one


def math(gold):
    return make({"question": "?", "answer": gold}, "1")


@pytest.mark.parametrize(
    ("gold", "answer", "score"), [(*p, 1.0) for p in RIGHT] + [(*p, 0.0) for p in WRONG]
)
def test_formulas_are_compared_by_what_they_mean(grader, gold, answer, score):
    pytest.importorskip("math_verify")
    assert grader.score(math(gold), f"\\boxed{{{answer}}}") == (score, None)


@pytest.mark.parametrize(
    ("gold", "line", "score"),
    [
        ("42", "So the answer is 42.", 1.0),
        (r"\frac12", r"Hence $x = \frac{1}{2}$.", 1.0),
        ("42", "So the answer is 41.", 0.0),
        ("Paris", "Paris.", 1.0),
        ("42", "I do not know.", 0.0),
    ],
)
def test_a_line_is_searched_for_a_formula(grader, gold, line, score):
    pytest.importorskip("math_verify")
    assert grader.score(math(gold), line) == (score, None)


@pytest.mark.parametrize(
    ("number", "written"),
    [(5, "5"), (5.0, "5"), (0.5, r"\frac12"), (1e-07, "0.0000001"), (10**30, "10^{30}")],
)
def test_answers_may_be_numbers(grader, number, written):
    pytest.importorskip("math_verify")
    assert grader.score(math(number), f"\\boxed{{{written}}}") == (1.0, None)


def test_no_answer_is_wrong_and_starts_no_process():
    with grading.Grader() as one:
        assert one.score(math("5"), None) == (0.0, None)
        problem = make({"question": "?", "answer": "B", "choices": ["1", "2"]}, "1")
        assert [one.score(problem, x)[0] for x in ("B", "A", None)] == [1, 0, 0]
        assert one.process is None


def test_an_answer_that_takes_too_long_is_wrong_and_the_next_is_compared():
    """A power that no signal interrupts; the process is ended."""
    pytest.importorskip("math_verify")
    with grading.Grader(seconds=1) as one:
        score, why = one.score(math("3"), r"\boxed{9^{9^{9^{9}}}}")
        assert score == 0
        assert "time" in why
        one.seconds = 60
        assert one.score(math("3"), r"\boxed{3}") == (1.0, None)


# -- reasoning-gym ---------------------------------------------------------------------------------


def test_the_gym_makes_the_same_problems_every_time_and_knows_its_own_answers():
    gym = pytest.importorskip("reasoning_gym")
    names = ["chain_sum", "word_ladder", "tower_of_hanoi", "knights_knaves", "bf"]
    first, again = (problems.from_gym(names, 3, seed=5) for _ in range(2))
    assert first == again
    assert len({p.prompt for p in first}) == len({p.id for p in first}) == 15
    assert all("<answer>" in p.prompt for p in first)
    assert first != problems.from_gym(names, 3, seed=6)
    with grading.Grader() as one:
        for problem in first:
            facts = problem.gym
            if facts["name"] == "word_ladder":  # depends on the order of a set
                continue
            data = gym.create_dataset(facts["name"], seed=5, size=3)
            entry = data[facts["index"]]
            assert entry["question"] in problem.prompt
            assert one.score(problem, entry["answer"]) == (1.0, None)
            assert one.score(problem, "zzz")[0] < 0.1


def test_a_task_that_the_gym_has_not_is_named_with_those_near_it():
    pytest.importorskip("reasoning_gym")
    with pytest.raises(UserError, match=r"no task 'knight_knaves'.*knights_knaves"):
        problems.from_gym(["knight_knaves"], 3, seed=0)
    with pytest.raises(UserError, match="no task ''"):
        problems.load("gym:", 3, (), 0)


def test_the_gym_never_runs_a_models_words(tmp_path):
    """n_queens runs an answer that is no board as Python."""
    pytest.importorskip("reasoning_gym")
    there = tmp_path / "there"
    [problem] = problems.from_gym(["n_queens"], 1, seed=0)
    with grading.Grader() as one:
        for answer in (f"open({str(there)!r}, 'w')", f"[open][0]({str(there)!r}, 'w')"):
            assert one.score(problem, answer) == (0.0, None)
    assert not there.exists()


@pytest.mark.parametrize(
    ("answer", "fine"),
    [
        ("2*sin(x) + 3*(x + 1)**2.5", True),
        ('[["Q", "_"], ["_", "Q"]]', True),
        ("2(x + 1) and (y)", True),
        ("__import__('os')", False),
        ("open('x')", False),
        ("(open)('x')", False),
        ("[open][0]('x')", False),
        ("{0: open}[0] ('x')", False),
        ("''.format", False),
        ("S('x')", False),
        ("f'{open(1)}'", False),
    ],
)
def test_what_calls_or_reaches_is_not_harmless(answer, fine):
    assert grading.harmless(answer) is fine


# -- problems --------------------------------------------------------------------------------------


def write(path, *entries):
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
    return path


def test_a_file_of_each_kind(tmp_path):
    path = write(
        tmp_path / "a.jsonl",
        {"question": "1+1?", "answer": 2},
        {"prompt": "Say 3.", "answer": "3", "id": "three"},
        {"problem": "4?", "answer": "4", "unique_id": "test/4.json", "subject": "Algebra"},
        {"question": "Which?", "choices": ["x", "y", "z"], "answer": 2},
        {"question": "Which?", "choices": ["x", "y"], "answer": "y"},
        {"question": "Which?", "choices": ["B", "A"], "answer": "A"},
    )
    one, two, three, four, five, six = from_file(path)
    assert (one.id, one.kind, one.answer) == ("1", "math", "2")
    assert one.prompt == f"1+1?\n\n{problems.MATH}"
    assert (two.id, two.prompt) == ("three", "Say 3.")
    assert (three.id, three.group) == ("test/4.json", "Algebra")
    assert four.prompt == f"Which?\n\nA) x\nB) y\nC) z\n\n{problems.LETTER}"
    assert (four.kind, four.answer, four.choices) == ("letter", "C", 3)
    assert (five.answer, six.answer) == ("B", "A")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "holds no problem"),
        (b"\n  \n", "holds no problem"),
        (b"\xff", "not UTF-8"),
        (b"{}\n", 'line 1: "question" or "prompt"'),
        (b"\n[1]\n", "line 2: should be an object"),
        (b"{\n", "line 1: not JSON"),
        (b"[" * 100_000, "line 1: not JSON"),
        (b'{"question": "?"}', 'line 1: "answer" should be a text or a number, not null'),
        (b'{"question": "?", "answer": [1]}', '"answer" should be a text or a number'),
        (b'{"question": "?", "answer": NaN}', '"answer" should be a text or a number'),
        (b'{"question": "?", "answer": true}', '"answer" should be a text or a number'),
        (b'{"question": " ", "answer": 1}', '"question" or "prompt"'),
        (b'{"question": "?", "answer": "C", "choices": ["x", "y"]}', "a letter to B"),
        (b'{"question": "?", "answer": 2, "choices": ["x", "y"]}', "from 0 to 1"),
        (b'{"question": "?", "answer": 0, "choices": ["x"]}', "a list of 2 to 26"),
        (b'{"question": "?", "answer": 0, "choices": "xy"}', "a list of 2 to 26"),
        (b'{"question": "\\ud800", "answer": 1}', "not valid Unicode"),
        (b'{"id": 1, "question": "?", "answer": 1}\n' * 2, "line 2: the id '1' is there twice"),
    ],
)
def test_a_file_that_is_wrong_is_named_with_its_line(tmp_path, content, says):
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        from_file(path)
    assert says in str(caught.value)
    assert str(path) in str(caught.value)


class Hub:
    """What hf_hub_download is asked for, and the files it gives."""

    def __init__(self, files):
        self.files, self.asked = files, []

    def __call__(self, repository, name, repo_type):
        self.asked.append((repository, name, repo_type))
        return str(self.files[repository])


def test_math500_is_its_file_on_the_hub(tmp_path, monkeypatch):
    pytest.importorskip("math_verify")
    entry = {"problem": "1+1?", "solution": "2", "answer": "2", "subject": "Algebra", "level": 1}
    entries = [{**entry, "unique_id": f"test/algebra/{i}.json"} for i in range(3)]
    hub = Hub({"HuggingFaceH4/MATH-500": write(tmp_path / "test.jsonl", *entries)})
    monkeypatch.setattr("huggingface_hub.hf_hub_download", hub)
    found = problems.load("math500", 2, (), 0)
    assert [p.id for p in found] == ["test/algebra/0.json", "test/algebra/1.json"]
    assert found[0].group == "Algebra"
    assert hub.asked == [("HuggingFaceH4/MATH-500", "test.jsonl", "dataset")]


def test_mmlu_is_a_table_per_subject(tmp_path, monkeypatch):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    row = {"question": "Which?", "subject": "s", "choices": ["1", "2", "3", "4"], "answer": 3}
    parquet.write_table(pyarrow.Table.from_pylist([row] * 3), tmp_path / "t.parquet")
    hub = Hub({"cais/mmlu": tmp_path / "t.parquet"})
    monkeypatch.setattr("huggingface_hub.hf_hub_download", hub)
    found = problems.load("mmlu", 2, ("anatomy", "astronomy"), 0)
    assert [p.id for p in found] == ["anatomy-0", "anatomy-1", "astronomy-0", "astronomy-1"]
    assert {(p.kind, p.answer, p.choices) for p in found} == {("letter", "D", 4)}
    assert hub.asked[0] == ("cais/mmlu", "anatomy/test-00000-of-00001.parquet", "dataset")
    assert len(problems.SUBJECTS) == 8

    (tmp_path / "t.parquet").write_bytes(b"no table")
    with pytest.raises(UserError, match="no table of questions"):
        problems.load("mmlu", 2, ("anatomy",), 0)


def test_what_cannot_be_fetched_names_the_local_way(monkeypatch):
    def fail(*_, **__):
        raise OSError("no\nnetwork")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fail)
    with pytest.raises(UserError, match=r"no network.*local FILE\.jsonl"):
        problems.load("math500", None, (), 0)


# -- runs ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model whose texts end early or late."""
    return tiny.folder(tmp_path_factory.mktemp("accuracy") / "model", eos=[257, *range(11, 20)])


@pytest.fixture(scope="module")
def engine(folder):
    """In float64, where rounding that depends on the batch changes no draw."""
    engine = Engine.from_pretrained(str(folder), "cpu", "float32")
    return Engine(engine.model.double(), engine.text, engine.name)


OPTIONS = {
    "model": "tiny",
    "revision": None,
    "dtype": "float32",
    "device": "cpu",
    "positions": "absolute",
    "max_new_tokens": 48,
    "temperature": 1.0,
    "top_p": 0.9,
    "seed": 3,
}
ARGV = [
    "--policies",
    "full",
    "lethe-plus",
    "h2o",
    "random",
    "--budget",
    "24",
    "60%",
    "--protect",
    "no",
]
ARGV += ["--interval", "7"]
SPEED = ("kv_bytes_peak", "tokens_per_second", "parts")


@pytest.fixture(scope="module")
def some(engine):
    """Seven problems, two of them with one prompt; three have the full cache's own answer."""
    made = [
        Problem(str(i), "ab"[i % 2], f"Say {i % 6}" * (i % 6 + 1), "letter", "", 4)
        for i in range(7)
    ]
    return [Problem(p.id, p.group, p.prompt, "math", str(i)) for i, p in enumerate(made)]


class Fake:
    """Grades without a process: an answer is right as often as not, by its content."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def score(self, problem, answer):
        return float(answer is not None and sum(answer.encode()) % 2), None


@pytest.fixture(autouse=True)
def _no_process(request, monkeypatch):
    if "engine" in request.fixturenames:
        monkeypatch.setattr(accuracy, "Grader", Fake)


def rows(engine, some, lines, samples=2, batch_size=3, options=OPTIONS, argv=ARGV):
    args = accuracy.arguments(["--task", "x.jsonl", "--temperature", "1", *argv])
    return accuracy.Bench(engine, some, lines, options, samples, batch_size, "x").run(args)


def texts(lines):
    """What the file says of texts and grades, less what runs cost."""
    return {key: result for key, result in lines.found.items() if '"part"' not in key}


def figures(found):
    return [{k: v for k, v in row.items() if k not in SPEED} for row in found]


@pytest.fixture(scope="module")
def whole(engine, some):
    """An uninterrupted run, one sequence at a time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(accuracy, "Grader", Fake)
        lines = Lines(None)
        return rows(engine, some, lines, batch_size=1), texts(lines)


def test_the_run_is_worth_testing_with(whole):
    found, written = whole
    assert [row["choice"] for row in found] == ["full", *["lethe-plus", "h2o", "random"] * 2]
    assert len({row["accuracy"][0] for row in found}) > 2
    assert found[0]["share"] == 1
    assert all(0 < row["share"] < 0.95 for row in found[1:])
    assert {result["finish_reason"] for result in written.values() if "text" in result} == {
        "stop",
        "length",
    }
    assert len({result["text"] for result in written.values() if "text" in result}) > 40


@pytest.mark.parametrize("batch_size", [3, 14])
def test_batches_change_nothing(engine, some, whole, batch_size):
    lines = Lines(None)
    found = rows(engine, some, lines, batch_size=batch_size)
    assert texts(lines) == whole[1]
    assert figures(found) == figures(whole[0])
    assert found[0]["kv_bytes_peak"] > whole[0][0]["kv_bytes_peak"]


def test_the_order_of_problems_changes_nothing_but_the_bootstraps_draws(engine, some, whole):
    lines = Lines(None)
    found = rows(engine, some[::-1], lines)
    assert texts(lines) == whole[1]
    for mine, its in zip(found, whole[0], strict=True):
        assert mine["accuracy"][0] == its["accuracy"][0]
        assert mine["holds"] == pytest.approx(its["holds"])


def test_what_a_run_cost_is_not_anothers(engine, some, whole):
    """Texts are those of any batch, speed and memory those of this one."""
    lines = Lines(None)
    rows(engine, some, lines, batch_size=14)
    for argv in ({"batch_size": 1}, {"batch_size": 14, "some": some[:2]}):
        found = rows(engine, argv.pop("some", some), lines, **argv)
        assert found[0]["kv_bytes_peak"] is None
        assert found[0]["accuracy"] is not None


def test_fewer_samples_and_problems_are_a_part(engine, some, whole):
    lines = Lines(None)
    argv = [*ARGV[:6], "24", *ARGV[8:]]  # a percentage would be one of another length
    rows(engine, some[:4], lines, samples=1, argv=argv)
    assert texts(lines).items() <= whole[1].items()


class Stopped(Lines):
    """Presses Ctrl-C at its n-th line; what was begun may be cut off in the middle of a line."""

    def __init__(self, path, after):
        super().__init__(path)
        self.after = after

    def put(self, key, result):
        if self.after == 0:
            raise KeyboardInterrupt
        self.after -= 1
        return super().put(key, result)


@pytest.mark.parametrize("cut", [0, 1, 300])
def test_going_on_is_never_having_stopped(engine, some, whole, tmp_path, cut):
    path, tries = tmp_path / "lines.jsonl", 0
    while True:
        lines = Stopped(path, after=23 + 9 * tries)
        tries += 1
        try:
            found = rows(engine, some, lines)
        except KeyboardInterrupt:
            path.write_bytes(path.read_bytes()[: -cut or None])
        else:
            break
    assert tries > 3
    assert texts(Lines(path)) == whole[1]
    assert figures(found) == figures(whole[0])
    before = path.read_bytes()
    assert rows(engine, some, Lines(path)) == found  # complete: nothing is written any more
    assert path.read_bytes() == before


def test_a_real_interrupt_keeps_what_has_ended(engine, some, whole, tmp_path):
    path = tmp_path / "lines.jsonl"
    lines, put = Lines(path), Lines.put

    def press(key, result):
        if len(lines.found) == 9:
            signal.raise_signal(signal.SIGINT)
        return put(lines, key, result)

    lines.put = press
    with pytest.raises(KeyboardInterrupt):
        rows(engine, some, lines)
    assert 9 < len(Lines(path).found) < len(whole[1])
    assert texts(Lines(path)).items() <= whole[1].items()
    found = rows(engine, some, Lines(path))
    assert figures(found) == figures(whole[0])
    assert len(found[0]["parts"]) == 2
    assert found[0]["tokens_per_second"] > 0


def test_greedy_texts_are_the_engines(engine, some):
    lines = Lines(None)
    options = {**OPTIONS, "temperature": 0.0, "top_p": None, "seed": None}
    [row] = rows(engine, some, lines, samples=1, options=options, argv=["--policies", "full"])
    result = engine.generate([p.prompt for p in some], max_new_tokens=48)
    ends = [one.finish_reason for one in result.sequences]
    assert {one.text for one in result.sequences} == {
        result["text"] for result in lines.found.values() if "text" in result
    }
    assert row["truncated"] == ends.count("length") / 7
    assert row["tokens"] == sum(one.generated_tokens for one in result.sequences) / 7
    assert row["less_full"] is None


def test_kept_is_what_the_cache_held_at_every_step(engine, some):
    """One sequence after the other: every step's mean over layers, looked at from outside."""
    args = accuracy.arguments(
        ["--task", "x.jsonl", *ARGV, "--budget", "24", "--policies", "lethe-plus"]
    )
    bench = accuracy.Bench(engine, some[:3], Lines(None), {**OPTIONS, "temperature": 0.0}, 1, 1)
    [row] = bench.run(args)
    [cell] = accuracy.make_cells(args, bench.longest)
    held, seen = [], []

    def on_step(cache):
        held.append(sum(layer.lengths[0] for layer in cache.layers) / len(cache.layers))
        seen.append(cache.seen[0])

    engine.generate([p.prompt for p in some[:3]], cell.policy, 48, batch_size=1, on_step=on_step)
    assert row["holds"] == pytest.approx(sum(held) / len(held))
    assert row["share"] == pytest.approx(sum(held) / sum(seen))


@pytest.mark.parametrize("name", ["lethe", "lethe-plus", "h2o", "snapkv", "random"])
def test_a_prompt_on_top_costs_no_budget_whatever_its_length(engine, some, name):
    """In one batch every prompt has the text that it has alone, with a budget of its own length and
    the number; and pruning changes some of them."""
    make, _ = accuracy.CHOICES[name]
    options = {"interval": 4, "sinks": 2}
    options |= {"window": 2} if name == "snapkv" else {}
    ids = [engine.text.encode_prompt(p.prompt) for p in some[:4]]
    assert len(set(map(len, ids))) > 1
    beside = accuracy.on_top(make)(budget=6, **options)
    beside.check_prompt(max(map(len, ids)))
    found = engine.generate(ids, beside, 40, batch_size=4).sequences
    for one, prompt in zip(found, ids, strict=True):
        [alone] = engine.generate([prompt], make(budget=len(prompt) + 6, **options), 40).sequences
        assert one.token_ids == alone.token_ids
    full = engine.generate(ids, FullKV(), 40, batch_size=4).sequences
    assert [one.token_ids for one in found] != [one.token_ids for one in full]


def test_a_window_of_queries_takes_at_most_a_quarter_of_the_budget(engine, some):
    argv = ["--policies", "full", "snapkv", "rkv", "--budget", "100", "24", "2"]
    args = accuracy.arguments(["--task", "x.jsonl", *argv, "--protect", "no", "--sinks", "0"])
    cells = accuracy.make_cells(args, longest=1)[1:]
    assert [cell.policy.window for cell in cells] == [25, 8, 6, 6, 1, 1]


def test_intervals_are_of_problems_and_differences_are_paired():
    def graded(*scores):
        return [[{"score": score} for score in samples] for samples in scores]

    mine, full = graded((1, 1), (1, 0), (0, 0)), graded((1, 1), (1, 1), (0, 0.999))
    mean, low, high = accuracy.interval(mine)
    assert mean == 0.5
    assert low <= mean <= high
    assert accuracy.interval(mine, full)[0] == pytest.approx(-1 / 6)
    assert accuracy.interval(full, full) == [0, 0, 0]


@pytest.mark.parametrize(
    ("ids", "looped"),
    [
        ([1] * 32, True),
        ([1] * 31, False),
        ([9, 8, 7, *[1, 2, 3] * 11], True),
        ([*range(100)], False),
        ([*range(100)] * 4, True),
        ([*range(100)] * 3, False),
        ([*[5] * 100, 6], False),
        ([*range(300)] * 8, False),
        ([], False),
    ],
)
def test_a_loop_is_a_few_tokens_over_and_over(ids, looped):
    assert accuracy.loops(ids) is looped


# -- the command line ------------------------------------------------------------------------------


@pytest.fixture
def command(folder, tmp_path, capsys, engine):
    """Runs the command with the tiny model; -> exit code, standard output, standard error."""
    write(
        tmp_path / "p.jsonl",
        {"question": "Say it", "answer": "1", "subject": "a"},
        {"question": "Say B", "answer": "B", "choices": ["x", "y"], "subject": "b"},
    )

    def call(*argv, task=tmp_path / "p.jsonl"):
        start = ["--task", task, "--model", folder, "--dtype", "float32", "--max-new-tokens", 40]
        code = accuracy.main([*map(str, [*start, *argv])])
        return code, *capsys.readouterr()

    return call


def test_a_table_a_file_of_figures_and_going_on(command, tmp_path):
    pytest.importorskip("math_verify")
    argv = ["--policies", "full", "lethe-plus", "lethe", "h2o", "--budget", "98%", "none"]
    argv += ["--interval", "8"]
    argv += ["--lines", tmp_path / "l.jsonl", "--json", tmp_path / "f.json"]
    code, out, _ = command(*argv)
    assert code == 0
    facts = json.loads((tmp_path / "f.json").read_text(encoding="utf-8"))
    assert facts["versions"]["torch"]
    assert facts["settings"]["temperature"] == 0
    assert facts["hardware"] in out
    assert [row["choice"] for row in facts["rows"]] == [
        "full", "lethe-plus", "lethe", "h2o", "lethe",
    ]  # fmt: skip
    full, percent = facts["rows"][:2]
    mean_length = (
        sum(
            json.loads(line)["result"][name]
            for line in (tmp_path / "l.jsonl").read_text(encoding="utf-8").splitlines()[:2]
            for name in ("tokens",)  # the prompt is protected, and on top
        )
        / 2
    )
    assert percent["policy"]["budget"] == round(0.98 * mean_length)
    assert full["groups"].keys() == {"a", "b"}
    assert facts["rows"][4]["policy"]["budget"] is None
    head, rule, *lines = [line for line in out.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in (head, rule, *lines[:5])} == {12}
    assert f"| lethe-plus | protected | 98% = {percent['policy']['budget']} |" in out
    before = (tmp_path / "l.jsonl").read_bytes()
    assert command(*argv)[:2] == (0, out)
    assert (tmp_path / "l.jsonl").read_bytes() == before


def test_a_policy_that_cannot_be_is_named_before_and_in_the_table(command):
    pytest.importorskip("math_verify")
    code, out, error = command("--policies", "full", "lethe", "--budget", "3", "1%", "none")
    assert code == 0
    assert error.count("left out: lethe at 3: budget 3 is too small") == 1
    assert out.count("is too small for the prompt") == 1
    assert "| lethe | protected | 1% = " in out  # the prompt comes on top
    assert out.splitlines()[4].startswith("| full |")


WRONG_COMMANDS = [
    (
        ["--budget", "0"],
        "--budget: should be a number of tokens such as 512, or a share such as 10%, not '0'",
    ),
    (["--budget", "-5%"], "--budget"),
    (["--budget", "nan%"], "--budget"),
    (["--budget", "120%"], "--budget"),
    (["--policies", "no-such"], "--policies"),
    (["--problems", "0"], "--problems should be at least 1"),
    (["--samples", "2"], "give --temperature"),
    (["--batch-size", "0"], "--batch-size should be at least 1"),
    (["--temperature", "-1"], "temperature should be 0"),
    (["--policies", "lethe"], "add full to --policies"),
    (["--policies", "h2o", "--budget", "none"], "prunes to a budget"),
    (["--policies", "lethe", "--budget", "3"], "budget 3 is too small for the prompt"),
    (["--policies", "full", "h2o", "--budget", "3"], "change --budget or --protect"),
    (["--json", "/no/such/folder/x"], "cannot write /no/such/folder/x"),
    (["--lines", "/"], "cannot write /"),
    (["--lines", "x", "--json", "./x"], "x is named twice"),
    (["--model", "/no/such/folder"], "no such folder"),
]


@pytest.mark.parametrize(("argv", "says"), WRONG_COMMANDS)
def test_what_a_user_gets_wrong_is_one_line(command, argv, says):
    pytest.importorskip("math_verify")
    code, out, error = command(*argv)
    assert (code, out) == (2, "")
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert says in error


@pytest.mark.parametrize("content", [b"text without an end", b"[1]\n", b'{"a": 1}\nx', b"\xff\n"])
def test_a_file_of_something_else_stays_as_it_is(command, tmp_path, content):
    path = tmp_path / "other"
    path.write_bytes(content)
    code, _, error = command("--lines", path)
    assert code == 2
    assert "name another file" in error
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    ("task", "says"), [("mmmlu", "there are math500"), ("none.jsonl", "cannot read none.jsonl")]
)
def test_tasks_that_are_not_there(command, task, says):
    code, _, error = command(task=task)
    assert code == 2
    assert says in error


def test_a_package_that_is_not_there_is_named(command, monkeypatch):
    monkeypatch.setattr(problems, "version", lambda package: None)
    code, _, error = command()
    assert code == 2
    assert "pip install 'lethe-mini[bench]'" in error


def test_ctrl_c_says_how_to_go_on(command, monkeypatch):
    pytest.importorskip("math_verify")

    def press(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(accuracy.Bench, "run", press)
    code, _, error = command()
    assert code == 130
    assert "--lines" in error
