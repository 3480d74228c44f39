"""The prompts of a run, from a file or from the command line, and what is wrong with each.

A file of thousands has its bad lines. So nothing here ends at the first of them: a prompt that
cannot be run carries the reason, and `refuse` tells all of them at once.
"""

import codecs
import gzip
import json
import re
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..checkpoint.template import check_messages
from ..engine import Engine
from ..errors import PromptError, UserError, UserErrors
from ..generation.requests import encode
from ..policy import Policy

STDIN = Path("-")
OBJECTS = (".jsonl", ".ndjson")  # names of files with an object a line; others hold plain texts
BEGINNING = re.compile(r'\s*\{\s*($|("id"\s*:.*)?"(prompt|messages)"\s*:)')  # of such an object
TOLD = 10  # bad prompts that are named; the rest are counted


@dataclass(frozen=True)
class Prompt:
    """line: its number in the file; where: how an error names it, "p.jsonl, line 4 (id 'b')";
    error: why it cannot be run. An empty one says that nothing is wrong."""

    id: str | int
    prompt: str | list[dict]  # a text, or messages
    max_new_tokens: int | None = None
    line: int = field(default=0, compare=False)
    where: str = field(default="", compare=False)
    error: str = ""

    def told(self, error: str) -> str:
        return f"{self.where}: {error}" if self.where else error


def read_prompts(path: Path, raw: bool = False, system: str | None = None) -> list[Prompt]:
    """One prompt a line; in a .jsonl file an object a line: prompt or messages, maybe id,
    max_new_tokens. `-` is standard input, where a first `{` says that it is objects.

    Empty lines are passed over. Without an id a prompt goes by its line's number, from 1. A bad
    line gives a Prompt with an error. Raises UserError for a file that is bad as a whole.
    """
    source = "standard input" if path == STDIN else str(path)
    text = _read(path, source).replace("\r\n", "\n").replace("\r", "\n")
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise UserError(f"{source} holds no prompt; write one a line")
    first = lines[0][1]
    objects = Path(path.name.lower().removesuffix(".gz")).suffix in OBJECTS
    if path == STDIN:
        objects = first.lstrip().startswith("{")
    mend = 'write an object a line, such as {"prompt": "..."}'
    if objects and len(lines) > 1 and _holds_json(text):
        raise UserError(f"{source} is a single JSON value over several lines; {mend}")
    begins = BEGINNING.match(first) or (first.lstrip()[0] == "{" and _holds_json(first))
    if not objects and (begins or _holds_json(text)):
        name = "" if path == STDIN else "name it .jsonl, and "
        raise UserError(f"{source} holds JSON, but would be read as plain text; {name}{mend}")
    prompts = [_prompt(line, number, source, objects, raw, system) for number, line in lines]
    return _without_twins(prompts)


def _read(path: Path, source: str) -> str:
    """The text of a file, which may be packed by gzip or be UTF-16; bytes that are not UTF-8 become
    surrogates. Raises UserError."""
    try:
        if path != STDIN and path.is_dir():
            raise UserError(f"cannot read {source}: it is a folder; name a file")
        data = sys.stdin.buffer.read() if path == STDIN else path.read_bytes()
        if data.startswith(b"\x1f\x8b"):
            data = gzip.decompress(data)
        if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            return data.decode("utf-16")
    except (gzip.BadGzipFile, EOFError, zlib.error):
        raise UserError(f"{source} is a damaged gzip file; pack it again") from None
    except UnicodeDecodeError:
        raise UserError(f"{source} is damaged UTF-16 text; save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"cannot read {source}: {error.strerror}") from None
    return data.decode("utf-8-sig", "surrogateescape")  # Windows editors write a BOM


def _holds_json(text: str) -> bool:
    """Is it one JSON object or list?"""
    try:
        return isinstance(json.loads(text), dict | list)
    except (ValueError, RecursionError):
        return False


def _prompt(
    line: str, number: int, source: str, objects: bool, raw: bool, system: str | None
) -> Prompt:
    made = Prompt(number, "", None, number, f"{source}, line {number}")
    try:
        _check_text(line)
        if not objects:
            return replace(made, prompt=line)
        data = _object(line)
        id = data.get("id", number)
        if type(id) not in (str, int):
            raise UserError(f"id should be a string or a whole number, not {id!r:.80}")
        _check_unicode(id)
        if "id" in data:
            made = replace(made, id=id, where=f"{made.where} (id {id!r:.80})")
        prompt = _content(data, raw, system)
        _check_unicode(prompt)
        return replace(made, prompt=prompt, max_new_tokens=_limit(data))
    except UserError as error:
        return replace(made, error=str(error))


def _check_text(line: str) -> None:
    try:
        line.encode()
    except UnicodeEncodeError:
        raise UserError("not UTF-8 text; save it as UTF-8") from None
    if "\0" in line:
        raise UserError("it holds a NUL byte; save the file as UTF-8 text")


def _check_unicode(value) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise UserError("not valid Unicode; save it as UTF-8") from None


def _object(line: str) -> dict:
    try:
        data = json.loads(line)
    except (ValueError, RecursionError) as error:
        known = isinstance(error, json.JSONDecodeError)
        why = f"{error.msg} in column {error.colno}" if known else error
        raise UserError(f"not JSON ({why})") from None
    if not isinstance(data, dict) or ("prompt" in data) == ("messages" in data):
        raise UserError('should be an object with either "prompt" or "messages"')
    return data


def _content(data: dict, raw: bool, system: str | None) -> str | list[dict]:
    """The text or the messages of an object."""
    if "prompt" in data:
        prompt = data["prompt"]
        if not isinstance(prompt, str):
            raise UserError(f"prompt should be a string, not {prompt!r:.80}")
        if not prompt.strip():
            raise UserError("the prompt is empty; give it some text")
        return prompt
    messages = data["messages"]
    if not isinstance(messages, list):
        raise UserError(f"messages should be a list, not {messages!r:.80}")
    if raw:
        raise UserError("--raw leaves out the chat template, which messages need")
    check_messages(messages, system)
    return messages


def _limit(data: dict) -> int | None:
    most = data.get("max_new_tokens")
    if most is not None and (type(most) is not int or most < 1):
        raise UserError(f"max_new_tokens should be a number from 1, not {most!r:.80}")
    return most


def _without_twins(prompts: list[Prompt]) -> list[Prompt]:
    """The prompts; those with an id that was there before have an error."""
    known: dict[str | int, Prompt] = {}

    def checked(prompt: Prompt) -> Prompt:
        first = prompt if prompt.error else known.setdefault(prompt.id, prompt)
        if first is prompt:
            return prompt
        error = f"the id {prompt.id!r:.80} is there twice (line {first.line}); ids should differ"
        return replace(prompt, error=error)

    return [checked(prompt) for prompt in prompts]


def encode_all(
    engine: Engine,
    policy: Policy,
    prompts: list[Prompt],
    system: str | None = None,
    raw: bool = False,
    think: bool | None = None,
) -> tuple[list[Prompt], list[list[int]], list[Prompt]]:
    """The prompts that the model and the policy can take, their token ids, and the prompts that
    cannot be run, with their errors."""
    good, encoded, bad = [], [], []

    def sort(prompt: Prompt) -> None:
        try:
            encoded.append(encode(engine, policy, prompt.prompt, system, raw, think))
            good.append(prompt)
        except UserError as error:
            bad.append(replace(prompt, error=str(error)))

    for prompt in prompts:
        bad.append(prompt) if prompt.error else sort(prompt)
    return good, encoded, bad


def listed(bad: list[Prompt]) -> list[str]:
    """A line for each bad prompt, up to TOLD of them, and how many more there are."""
    lines = [prompt.told(prompt.error) for prompt in bad[:TOLD]]
    return [*lines, f"and {len(bad) - TOLD} more"] if len(bad) > TOLD else lines


def refuse(bad: list[Prompt], count: int, skip: bool) -> None:
    """Raises UserError, a line for each bad one of `count` prompts. skip: only if all are bad, as
    then an option is wrong rather than a prompt."""
    if not bad or (skip and len(bad) < count):
        return
    if len(bad) == count > 2 and len({prompt.error for prompt in bad}) == 1:
        raise UserError(f"{bad[0].where} and the {count - 1} others: {bad[0].error}")
    lines = listed(bad)
    if len(bad) < count:
        lines[-1] += f"; --skip-invalid leaves {'it' if len(bad) == 1 else 'them'} out"
    raise UserErrors(lines)


@contextmanager
def naming(prompts: list[Prompt]) -> Iterator[None]:
    """Around a call of `generate` for these prompts: an error of one of them names it."""
    try:
        yield
    except PromptError as error:
        raise UserError(prompts[error.number].told(error.reason)) from None
