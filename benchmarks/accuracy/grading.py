"""Which part of a text is its answer, and is it right?

Extraction is plain and done here. `math-verify` and `reasoning-gym` compare, in a process of their
own, which is this file run as a program. Either can work on a hostile answer for hours, inside
arithmetic that no signal interrupts. So a comparison that takes too long is killed and counts as
wrong. That process also makes reasoning-gym's problems, under a fixed hash seed, since some of them
depend on the order of a set.
"""

import importlib.metadata
import inspect
import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
from contextlib import suppress

from benchmarks import ROOT

MODULE = "benchmarks.accuracy.grading"
MEMORY = 2**33  # bytes of address space that the comparing process may have
PACKAGES = {"math": "math-verify", "gym": "reasoning-gym"}  # what compares which kind of answer

# -- extraction ------------------------------------------------------------------------------------

TEXT = r"\\(?:text|textbf|textit|mathrm|mathbf|mathit|bf|rm)\b\s*\{?"
OPTION = re.compile(rf"(?:{TEXT}|[\s*_$(\[{{])*([A-Za-z])\s*(?:$|[).:}}\]$*_])")
STATED = re.compile(
    rf"(?i:\banswer)\W{{0,4}}(?i:is\b)?(?:{TEXT}|[\s:*_$(\[{{])*([A-Z])(?![A-Za-z0-9'’])"
)


TAGGED = re.compile(r"<answer>((?:(?!</?answer>).)*)</answer>", re.DOTALL)


def boxes(text: str) -> list[tuple[int, str]]:
    r"""(place, content) of every \boxed{...} that is closed, not empty, and has none inside."""
    found, stack = [], []
    for token in re.finditer(r"\\f?boxed\s*\{|\\.|[{}]", text, re.DOTALL):
        if token[0] == "}":
            start = stack.pop() if stack else None
            if start is not None:
                content = text[start : token.start()].strip()
                if content and "\\boxed" not in content:
                    found.append((start, content))
        elif token[0].endswith("{") and token[0] != "\\{":
            stack.append(token.end() if len(token[0]) > 1 else None)
    return found


def last_line(text: str) -> str | None:
    """The last line that is not empty, of what follows the thinking."""
    lines = [line.strip() for line in text.rpartition("</think>")[2].splitlines()]
    return next((line for line in reversed(lines) if line), None)


def letter(text: str, count: int, ended: bool) -> str | None:
    """The last of `count` letters that the text boxes or calls its answer; else the last line."""
    named = [(place, OPTION.match(content)) for place, content in boxes(text)]
    named += [(match.start(1), match) for match in STATED.finditer(text)]
    if ended:
        named.append((-1, OPTION.match(last_line(text) or "")))
    letters = [(place, match[1].upper()) for place, match in named if match]
    known = [(place, one) for place, one in letters if ord(one) - ord("A") < count]
    return max(known)[1] if known else None


def extract(kind: str, text: str, ended: bool, choices: int = 0) -> str | None:
    """A text's answer as the model marked it, or None.

    kind: "math", which keeps the box around the answer, "letter" or "gym". The last mark counts. A
    text that ended by itself (`ended`) may have no mark: then its last line is the answer. A text
    that was cut off has none.
    """
    if kind == "letter":
        return letter(text, choices, ended)
    if kind == "gym" and (tagged := TAGGED.findall(text)):
        return tagged[-1].strip()
    if found := boxes(text):
        content = max(found)[1]
        return f"\\boxed{{{content}}}" if kind == "math" else content
    return last_line(text) if ended else None


# -- comparing: this side --------------------------------------------------------------------------


class Grader:
    """The process that compares. The first question starts it, the end of the block stops it."""

    def __init__(self, seconds: float = 30):
        self.seconds = seconds  # an answer may take; math-verify's own limits add up to less
        self.process: subprocess.Popen | None = None

    def __enter__(self) -> "Grader":
        return self

    def __exit__(self, *_) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None

    def ask(self, seconds: float | None = None, **question):
        """The process's answer. Raises TimeoutError, or RuntimeError with the error over there."""
        if self.process is None:
            env = {**os.environ, "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"}
            self.process = subprocess.Popen(
                [sys.executable, "-W", "ignore", "-m", MODULE],
                cwd=ROOT,
                env=env,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                encoding="ascii",
            )
        timer = threading.Timer(seconds or self.seconds, self.process.kill)
        timer.start()
        try:
            self.process.stdin.write(json.dumps(question) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            timer.cancel()
        if not line.endswith("\n"):  # killed: by the timer, or because memory ran out
            self.__exit__()
            raise TimeoutError
        reply = json.loads(line)
        if "error" in reply:
            raise RuntimeError(reply["error"])
        return reply["value"]

    def score(self, problem, answer: str | None) -> tuple[float, str | None]:
        """How right an answer is, from 0 to 1; and the reason where that could not be compared.

        problem: see problems.Problem. No answer is wrong."""
        if answer is None:
            return 0.0, None
        if problem.kind == "letter":
            return float(answer == problem.answer), None
        question = {"answer": answer, "gold": problem.answer}
        if problem.kind == "gym":
            question = {"answer": answer, **problem.gym}
        try:
            return self.ask(kind=problem.kind, **question), None
        except TimeoutError:
            return 0.0, "not compared: out of time or memory"
        except RuntimeError as error:
            return 0.0, f"not compared: {error}"


def version(package: str) -> str | None:
    """The version of an installed package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


# -- comparing: the other process ------------------------------------------------------------------

WORDS = re.compile(r"[^\W\d_]{3,}(?:[ '’-][^\W\d_]+)*")
CALL = re.compile(r"(\w+|[)\]}'\"])\s*\(")
CALLABLE = {
    "sin", "cos", "tan", "cot", "sec", "csc", "asin", "acos", "atan", "sinh", "cosh", "tanh",
    "exp", "log", "ln", "sqrt", "Abs", "abs", "and", "or", "not", "in", "if", "else",
}  # fmt: skip


def plain(text: str) -> str:
    r"""The text without \text{}, and without dollars, a full stop and spaces around it."""
    text = re.sub(r"\\(?:text|textbf|mathrm|mbox)\s*\{([^{}]*)\}", r"\1", text)
    return text.strip(" \t\n$.")


def same_math(answer: str, gold: str) -> float:
    r"""1.0 if the two mean the same to math-verify, to which 2 + 3 is 5.

    answer: a \boxed{...}, or a line with the answer at its end; gold: a formula, with or without
    dollars. Words are compared as words, since a parser of formulas takes them for products of
    letters, and an anagram for the same product.
    """
    mine, right = plain(re.sub(r"^\\boxed\{(.*)\}$", r"\1", answer, flags=re.DOTALL)), plain(gold)
    if mine == right:
        return 1.0
    if WORDS.fullmatch(right):
        return float(mine.casefold() == right.casefold())
    import math_verify

    marked = re.search(r"(?<!\\)\$|\\boxed|\\\(|\\\[", gold)
    gold = gold if marked else f"\\boxed{{{gold}}}"
    return float(math_verify.verify(math_verify.parse(gold), math_verify.parse(answer)))


def harmless(answer: str) -> bool:
    """False for a text that, run as Python, would call something or read an attribute."""
    called = (name for name in CALL.findall(answer) if not name.isdigit())
    reaches = "__" in answer or re.search(r"\.\s*[A-Za-z_]", answer)
    return not reaches and all(name in CALLABLE for name in called)


# What gsm_symbolic's questions end in keeps some models from reasoning at all.
RESULT_ONLY = (
    "Give the result as your final answer. Do not include units.",
    "Write down every step, and give the number alone, without units, as your final answer.",
)


class Gym:
    """reasoning-gym's datasets, each made once."""

    def __init__(self):
        self.made = {}

    def dataset(self, name: str, seed: int, count: int):
        import reasoning_gym

        key = (name, seed, count)
        if key not in self.made:
            self.made[key] = reasoning_gym.create_dataset(name, seed=seed, size=count)
        return self.made[key]

    def names(self) -> list[str]:
        from reasoning_gym.factory import DATASETS

        return sorted(set(DATASETS) - {"composite"})  # that one mixes others

    def entries(self, name: str, seed: int, count: int) -> list[str]:
        """The prompts: reasoning-gym's own instructions, which ask for <answer> tags, and the
        question."""
        from reasoning_gym.utils import SYSTEM_PROMPTS

        dataset = self.dataset(name, seed, count)
        questions = [dataset[i]["question"].replace(*RESULT_ONLY) for i in range(count)]
        return [f"{SYSTEM_PROMPTS['default']}\n{question}" for question in questions]

    def score(self, answer: str, name: str, seed: int, count: int, index: int) -> float:
        dataset = self.dataset(name, seed, count)
        # Some of its graders run the answer as Python, and a model's text must never be run.
        source = inspect.getsource(sys.modules[type(dataset).__module__])
        if re.search(r"\b(?:eval|parse_expr|sympify)\(", source) and not harmless(answer):
            return 0.0
        return float(dataset.score_answer(answer, dataset[index]))


def serve() -> None:
    """Answers questions, one JSON object a line, until the input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the other side
    logging.disable()
    with suppress(ImportError, OSError, ValueError):  # where there is such a limit
        import resource

        most = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, most))
    gym = Gym()
    asked = {"math": same_math, "gym": gym.score, "entries": gym.entries, "names": gym.names}
    replies = sys.stdout
    with open(os.devnull, "w", encoding="utf-8") as sys.stdout:  # some problems print
        for line in sys.stdin:
            question = json.loads(line)
            try:
                reply = {"value": asked[question.pop("kind")](**question)}
            except Exception as error:  # a strange answer can make a grader raise anything
                reply = {"error": f"{type(error).__name__}: {error}"[:300]}
            print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    serve()
