"""Many prompts from a file, results to a file, one JSON object a line; goes on where it stopped.

A line is written whole or not at all, as soon as its sequence ends. Every line names the settings
it was made with, so that a second run with the same prompts and settings completes the file, and
one with others is refused.
"""

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm import tqdm

from ..engine import Engine
from ..errors import UserError
from ..generation.stats import Result, kv_bytes
from ..policy import Policy

HEAD = b'{"id": '  # how every line begins


@dataclass(frozen=True)
class Prompt:
    id: str | int
    text: str
    max_new_tokens: int | None = None


def read_prompts(path: Path) -> list[Prompt]:
    """One prompt a line; in a .jsonl file an object a line: prompt, maybe id, max_new_tokens.

    Empty lines are passed over. Without an id a prompt goes by its line's number, from 1. Raises
    UserError that names the line.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # Windows editors write a BOM
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text; convert it") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    prompts: list[Prompt] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        prompts.append(
            _parse(line, number, where)
            if path.suffix in (".jsonl", ".ndjson")
            else Prompt(number, line)
        )
    if not prompts:
        raise UserError(f"{path} holds no prompt; write one a line")
    first: dict = {}
    for prompt in prompts:
        if first.setdefault(prompt.id, prompt) is not prompt:
            raise UserError(f"{path}: the id {prompt.id!r} is there twice; ids should differ")
    return prompts


def _parse(line: str, number: int, where: str) -> Prompt:
    try:
        data = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({error})") from None
    if not isinstance(data, dict) or not isinstance(data.get("prompt"), str):
        raise UserError(f'{where}: should be an object with "prompt", a string')
    if not data["prompt"].strip():
        raise UserError(f"{where}: the prompt is empty; give it some text")
    id, most = data.get("id", number), data.get("max_new_tokens")
    try:
        f"{id}{data['prompt']}".encode()
    except UnicodeEncodeError:
        raise UserError(f"{where}: not valid Unicode; save it as UTF-8") from None
    if type(id) not in (str, int):
        raise UserError(f"{where}: id should be a string or a whole number, not {id!r}")
    if most is not None and (type(most) is not int or most < 1):
        raise UserError(f"{where}: max_new_tokens should be a number from 1, not {most!r}")
    return Prompt(id, data["prompt"], most)


def digest(settings: dict) -> str:
    """A short name for settings: equal ones have equal names."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def read_done(path: Path, prompts: list[Prompt], num_samples: int, runs: dict) -> set[tuple]:
    """The (id, sample) pairs that an output file already has; `runs`: id -> the digest of what its
    lines are made with. Raises UserError if the file is not this run's; only then is a last line
    that a crash cut short taken off."""
    if not path.exists():
        return set()
    mend = "name another --output, or delete it"
    if not path.is_file():
        raise UserError(f"{path} is no regular file; {mend}")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    known, done = {prompt.id: prompt.text for prompt in prompts}, set()
    whole, torn = data[: data.rfind(b"\n") + 1], data[data.rfind(b"\n") + 1 :]
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            entry = json.loads(line)
            key, prompt, made_by = (entry["id"], entry["sample"]), entry["prompt"], entry["run"]
            if type(key[0]) not in (str, int) or type(key[1]) is not int:
                raise TypeError
        except (ValueError, KeyError, TypeError, RecursionError):
            raise UserError(f"{path}, line {number}: not a line of this command; {mend}") from None
        if known.get(key[0]) != prompt or not 0 <= key[1] < num_samples:
            raise UserError(f"{path} belongs to other prompts (line {number}); {mend}")
        if made_by != runs[key[0]]:
            raise UserError(f"{path} was made with other settings (line {number}); {mend}")
        if key in done:
            raise UserError(f"{path}, line {number}: {key[0]!r} is there twice; {mend}")
        done.add(key)
    if torn:
        if not (torn.startswith(HEAD) or HEAD.startswith(torn)):
            raise UserError(f"{path} does not end in a line of this command; {mend}")
        os.truncate(path, len(whole))
    return done


def run_batch(
    engine: Engine,
    prompts: list[Prompt],
    policy: Policy,
    output: Path,
    max_new_tokens: int,
    num_samples: int = 1,
    quiet: bool = False,
    **options,
) -> Result | None:
    """Writes to `output` what it lacks; None if it is complete. Options: Engine.generate's."""
    facts = {k: v for k, v in options.items() if k not in ("batch_size", "prefill_chunk")}
    settings = {"model": engine.name, "dtype": str(engine.dtype), "policy": policy.name}
    settings |= {**asdict(policy), **facts}
    limits = {prompt.id: prompt.max_new_tokens or max_new_tokens for prompt in prompts}
    runs = {id: digest({**settings, "max_new_tokens": limit}) for id, limit in limits.items()}
    done = read_done(output, prompts, num_samples, runs)
    # A prompt is run again whole if a sample of it is missing: samples share their prefill.
    left = [p for p in prompts if any((p.id, i) not in done for i in range(num_samples))]
    if not left:
        return None
    missing = len(prompts) * num_samples - len(done)
    try:
        file = os.open(output, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    except OSError as error:
        raise UserError(f"cannot write {output}: {error.strerror}") from None
    bar = tqdm(total=missing, unit="seq", disable=quiet or None, miniters=0)
    tokens = 0

    def on_token(index: int, token: int) -> None:
        nonlocal tokens
        tokens += 1

    def on_step(cache) -> None:
        rate = tokens / max(1e-9, bar.format_dict["elapsed"] or 0)
        kv = kv_bytes(cache) / 1e6
        bar.set_postfix_str(f"{rate:.1f} tokens/s, KV {kv:.1f} MB", refresh=False)
        bar.update(0)

    def on_finish(index: int, one) -> None:
        prompt, number = left[index // num_samples], index % num_samples
        if (prompt.id, number) in done:
            return
        entry = {"id": prompt.id, "sample": number, "prompt": prompt.text, **asdict(one)}
        line = json.dumps({**entry, "run": runs[prompt.id]}, ensure_ascii=False).encode() + b"\n"
        if os.write(file, line) != len(line):  # one call, so that a line is there whole or not
            raise UserError(f"cannot write {output}: the disk is full")
        bar.update()

    try:
        return engine.generate(
            [prompt.text for prompt in left],
            policy,
            max_new_tokens=[limits[prompt.id] for prompt in left],
            num_samples=num_samples,
            on_token=on_token,
            on_finish=on_finish,
            on_step=None if bar.disable else on_step,
            **options,
        )
    except OSError as error:
        raise UserError(f"cannot write {output}: {error.strerror}") from None
    finally:
        os.close(file)
        bar.close()
