"""The problems of the accuracy benchmark: from the hub, from a file, or from reasoning-gym."""

import difflib
import json
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path

from benchmarks.accuracy.grading import PACKAGES, Grader, version
from lethe_mini.checkpoint.load import _quiet
from lethe_mini.errors import UserError

MATH = "Please reason step by step, and put your final answer within \\boxed{}."
LETTER = "Please reason step by step, and put the letter of your answer within \\boxed{}."
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
# The paper reports eight subjects of MMLU. These are the first eight, in alphabetical order.
SUBJECTS = (
    "abstract_algebra", "anatomy", "astronomy", "business_ethics", "clinical_knowledge",
    "college_biology", "college_chemistry", "college_computer_science",
)  # fmt: skip
GYM_PROBLEMS = 50  # of each task, unless told


@dataclass(frozen=True)
class Problem:
    """kind: how an answer is found and compared: "math", "letter" (one of `choices`) or "gym"."""

    id: str
    group: str
    prompt: str
    kind: str
    answer: str = ""
    choices: int = 0
    gym: dict = field(default_factory=dict)  # name, seed, count and index of the entry


def load(task: str, limit: int | None, subjects: tuple[str, ...], seed: int) -> list[Problem]:
    """At most `limit` problems of the task, or of each subject or game where it has several. Raises
    UserError."""
    if task.startswith("gym:"):
        parts = (name.strip() for name in task.removeprefix("gym:").split(","))
        names = list(dict.fromkeys(filter(None, parts)))
        problems = from_gym(names, GYM_PROBLEMS if limit is None else limit, seed)
    elif task == "mmlu":
        problems = [p for subject in subjects for p in mmlu(subject)[:limit]]
    elif task == "math500":
        problems = from_file(_fetch("HuggingFaceH4/MATH-500", "test.jsonl", task))[:limit]
    elif task.endswith((".jsonl", ".ndjson")):
        problems = from_file(Path(task))[:limit]
    else:
        raise UserError(f"no task {task!r}; there are math500, mmlu, FILE.jsonl and gym:NAME,NAME")
    for kind in {p.kind for p in problems} & set(PACKAGES):
        need(PACKAGES[kind])
    return problems


def need(package: str) -> None:
    """Raises UserError if a package of the extra `bench` is not installed."""
    if version(package) is None:
        raise UserError(f"{package} is not installed; pip install 'lethe-mini[bench]'")


# -- files -----------------------------------------------------------------------------------------


def from_file(path: Path) -> list[Problem]:
    """One JSON object a line: question (or problem) or prompt, answer, maybe choices, id, subject.

    A question gets its choices and an instruction; a prompt is passed on as it is. With choices,
    the answer is a letter, a number from 0, or one of the choices. Empty lines are skipped. Raises
    UserError that names the line.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text; convert it") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    problems: dict[str, Problem] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}, line {number}: not JSON ({error})") from None
        if not isinstance(entry, dict):
            raise UserError(f"{path}, line {number}: should be an object, not {line.strip()[:40]}")
        try:
            problem = make(entry, str(number))
        except UserError as error:
            raise UserError(f"{path}, line {number}: {error}") from None
        if problem.id in problems:
            raise UserError(f"{path}, line {number}: the id {problem.id!r} is there twice")
        problems[problem.id] = problem
    if not problems:
        raise UserError(f"{path} holds no problem; write one JSON object a line")
    return list(problems.values())


def make(entry: dict, id: str) -> Problem:
    """The problem in a line of a file, or in a row of a table."""
    name = next((key for key in ("prompt", "question", "problem") if key in entry), "prompt")
    text = entry.get(name)
    if not isinstance(text, str) or not text.strip():
        raise UserError('"question" or "prompt" should be a text')
    id = str(entry.get("id", entry.get("unique_id", id)))
    group = str(entry.get("subject", ""))
    answer, choices = entry.get("answer"), entry.get("choices")
    if choices is None:
        prompt = text if name == "prompt" else f"{text}\n\n{MATH}"
        return _checked(Problem(id, group, prompt, "math", _written(answer)))
    right = _letter(answer, choices)
    listed = [f"{LETTERS[i]}) {choice}" for i, choice in enumerate(choices)]
    prompt = text if name == "prompt" else "\n".join([text, "", *listed, "", LETTER])
    return _checked(Problem(id, group, prompt, "letter", right, len(choices)))


def _checked(problem: Problem) -> Problem:
    try:
        f"{problem.id}{problem.group}{problem.prompt}{problem.answer}".encode()
    except UnicodeEncodeError:
        raise UserError("not valid Unicode; save it as UTF-8") from None
    return problem


def _written(answer) -> str:
    """An answer as text; a number without an exponent, which formulas do not have."""
    if type(answer) in (int, float) and answer == answer and abs(answer) != float("inf"):
        return f"{Decimal(str(answer)):f}"
    if not isinstance(answer, str) or not answer.strip():
        raise UserError(f'"answer" should be a text or a number, not {json.dumps(answer)}')
    return answer


def _letter(answer, choices) -> str:
    if not isinstance(choices, list) or not 2 <= len(choices) <= len(LETTERS):
        raise UserError(f'"choices" should be a list of 2 to {len(LETTERS)}')
    letters = LETTERS[: len(choices)]
    if type(answer) is int and 0 <= answer < len(choices):
        return letters[answer]
    if isinstance(answer, str):
        if len(answer.strip()) == 1 and answer.strip() in letters:
            return answer.strip()
        if choices.count(answer) == 1:
            return letters[choices.index(answer)]
    raise UserError(
        f'"answer" should be a letter to {letters[-1]}, a number from 0 to {len(choices) - 1}, or '
        f"one of the choices, not {json.dumps(answer)}"
    )


# -- the hub ---------------------------------------------------------------------------------------


def mmlu(subject: str) -> list[Problem]:
    """The test questions of a subject: question, choices, and the right one's number."""
    need("pyarrow")
    import pyarrow.parquet

    path = _fetch("cais/mmlu", f"{subject}/test-00000-of-00001.parquet", f"mmlu's {subject}")
    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
        return [make({**row, "subject": subject}, f"{subject}-{i}") for i, row in enumerate(rows)]
    except (pyarrow.ArrowException, OSError, UserError) as error:
        why = " ".join(str(error).split())[:200]
        raise UserError(f"{path} is no table of questions ({why}); delete and fetch it") from None


def _fetch(repository: str, name: str, what: str) -> Path:
    """A file of a dataset on the hub, from the cache if it is there. Raises UserError."""
    from huggingface_hub import hf_hub_download

    try:
        with _quiet("huggingface_hub"):
            return Path(hf_hub_download(repository, name, repo_type="dataset"))
    except Exception as error:  # without a network, releases of the client raise different errors
        reason = " ".join(str(error.__cause__ or error).split()) or type(error).__name__
        raise UserError(
            f"{what} ({name} of the dataset {repository}) could not be fetched from the hub "
            f"({reason[:200]}); check the connection and the name, or give a local FILE.jsonl"
        ) from None


# -- reasoning-gym ---------------------------------------------------------------------------------


def from_gym(names: list[str], count: int, seed: int) -> list[Problem]:
    """`count` problems of each task of reasoning-gym; a seed always gives the same ones."""
    need("reasoning-gym")
    problems = []
    with Grader() as grader:
        known = grader.ask(kind="names", seconds=300)
        for name in names or [""]:
            if name not in known:
                near = difflib.get_close_matches(name, known, 5, 0.4) or known[:5]
                raise UserError(
                    f"reasoning-gym has no task {name!r}; near it are {', '.join(near)}"
                )
            facts = {"name": name, "seed": seed, "count": count}
            try:
                prompts = grader.ask(kind="entries", seconds=3600, **facts)
            except (TimeoutError, RuntimeError) as error:
                raise UserError(f"reasoning-gym cannot make {count} of {name}: {error}") from None
            problems += [
                Problem(f"{name}-{i}", name, prompt, "gym", gym={**facts, "index": i})
                for i, prompt in enumerate(prompts)
            ]
    return problems
