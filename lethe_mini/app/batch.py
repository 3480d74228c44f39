"""Many prompts from a file, results to a file, one JSON object a line; goes on where it stopped.

A line is written whole or not at all, as soon as its sequence ends. Every line names the settings
it was made with, so that a second run with the same prompts and settings completes the file, and
one with others is refused.
"""

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm import tqdm

from ..checkpoint.template import check_messages
from ..engine import Engine
from ..errors import UserError
from ..generation.sampling import Sampling
from ..generation.stats import Result, kv_bytes
from ..jsonlines import Appender, digest, read_lines
from ..policy import Policy

HEAD = b'{"id": '  # how every line begins
MEND = "name another --output, or delete it"


@dataclass(frozen=True)
class Prompt:
    id: str | int
    prompt: str | list[dict]  # a text, or messages
    max_new_tokens: int | None = None


def read_prompts(path: Path, raw: bool = False, system: str | None = None) -> list[Prompt]:
    """One prompt a line; in a .jsonl file an object a line: prompt or messages, maybe id,
    max_new_tokens.

    Empty lines are passed over. Without an id a prompt goes by its line's number, from 1. Raises
    UserError that names the line, also for messages that do not go with `raw` or `system`.
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
            _parse(line, number, where, raw, system)
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


def _parse(line: str, number: int, where: str, raw: bool, system: str | None) -> Prompt:
    try:
        data = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({error})") from None
    if not isinstance(data, dict) or ("prompt" in data) == ("messages" in data):
        raise UserError(f'{where}: should be an object with either "prompt" or "messages"')
    prompt = data.get("prompt")
    if "messages" in data:
        prompt = _messages(data["messages"], where, raw, system)
    elif not isinstance(prompt, str):
        raise UserError(f"{where}: prompt should be a string, not {prompt!r:.80}")
    elif not prompt.strip():
        raise UserError(f"{where}: the prompt is empty; give it some text")
    id, most = data.get("id", number), data.get("max_new_tokens")
    try:
        json.dumps([id, prompt], ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise UserError(f"{where}: not valid Unicode; save it as UTF-8") from None
    if type(id) not in (str, int):
        raise UserError(f"{where}: id should be a string or a whole number, not {id!r}")
    if most is not None and (type(most) is not int or most < 1):
        raise UserError(f"{where}: max_new_tokens should be a number from 1, not {most!r}")
    return Prompt(id, prompt, most)


def _messages(messages, where: str, raw: bool, system: str | None) -> list[dict]:
    if not isinstance(messages, list):
        raise UserError(f"{where}: messages should be a list, not {messages!r:.80}")
    if raw:
        raise UserError(f"{where}: --raw leaves out the chat template, which messages need")
    try:
        check_messages(messages, system)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    return messages


def read_done(path: Path, prompts: list[Prompt], num_samples: int, runs: dict) -> set[tuple]:
    """The (id, sample) pairs that an output file already has; `runs`: id -> the digest of what its
    lines are made with. Raises UserError if the file is not this run's; only then is a last line
    that a crash cut short taken off."""
    known, done = {prompt.id: digest(prompt.prompt) for prompt in prompts}, set()

    def accept(number: int, entry) -> None:
        key, prompt, made_by = (entry["id"], entry["sample"]), entry["prompt"], entry["run"]
        if type(key[0]) not in (str, int) or type(key[1]) is not int:
            raise TypeError
        if known.get(key[0]) != digest(prompt) or not 0 <= key[1] < num_samples:
            raise UserError(f"{path} belongs to other prompts (line {number}); {MEND}")
        if made_by != runs[key[0]]:
            raise UserError(f"{path} was made with other settings (line {number}); {MEND}")
        if key in done:
            raise UserError(f"{path}, line {number}: {key[0]!r} is there twice; {MEND}")
        done.add(key)

    read_lines(path, HEAD, accept, MEND)
    return done


def run_batch(
    engine: Engine,
    prompts: list[Prompt],
    policy: Policy,
    output: Path,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    num_samples: int = 1,
    quiet: bool = False,
    **options,
) -> Result | None:
    """Writes to `output` what it lacks; None if it is complete. Options: Engine.generate's."""
    sampling = Sampling.of(sampling, {}, engine.text)
    limits = {prompt.id: prompt.max_new_tokens or max_new_tokens for prompt in prompts}
    runs = _runs(engine, policy, sampling, limits, options)
    done = read_done(output, prompts, num_samples, runs)
    # A prompt is run again whole if a sample of it is missing: samples share their prefill.
    left = [p for p in prompts if any((p.id, i) not in done for i in range(num_samples))]
    if not left:
        return None
    missing, tokens = len(prompts) * num_samples - len(done), 0
    if not quiet:
        print(f"writing {missing} texts to {output}", file=sys.stderr, flush=True)

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
        entry = {"id": prompt.id, "sample": number, "prompt": prompt.prompt, **asdict(one)}
        file.write(json.dumps({**entry, "run": runs[prompt.id]}, ensure_ascii=False))
        bar.update()

    with (
        Appender(output) as file,
        tqdm(total=missing, unit="seq", disable=quiet or None, miniters=0) as bar,
    ):
        return engine.generate(
            [prompt.prompt for prompt in left],
            policy,
            [limits[prompt.id] for prompt in left],
            sampling,
            num_samples=num_samples,
            on_token=on_token,
            on_finish=on_finish,
            on_step=None if bar.disable else on_step,
            **options,
        )


def _runs(engine: Engine, policy: Policy, sampling: Sampling, limits: dict, options: dict) -> dict:
    """id -> a short name for all settings that its lines depend on."""
    facts = {k: v for k, v in options.items() if k not in ("batch_size", "prefill_chunk")}
    settings = {"model": engine.name, "dtype": str(engine.dtype), "policy": policy.name}
    settings |= {**asdict(policy), **asdict(sampling), **facts}
    if engine.text.template.name is not None:
        settings["template"] = engine.text.template.name
    return {id: digest({**settings, "max_new_tokens": limit}) for id, limit in limits.items()}
