"""Many prompts from a file, results to a file, one JSON object a line; goes on where it stopped.

A line is written whole or not at all, as soon as its sequence ends. Every line names the settings
it was made with, so that a second run with the same prompts and settings completes the file, and
one with others is refused. A prompt that is left out has a line that says why; once the prompt is
mended, its result follows.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from tqdm import tqdm

from ..engine import Engine
from ..errors import UserError
from ..generation.sampling import Sampling
from ..generation.stats import Result, kv_bytes
from ..jsonlines import Appender, digest, read_lines
from ..policy import Policy
from .prompts import Prompt, encode_all, naming, refuse

HEAD = b'{"id": '  # how every line begins
MEND = "name another --output, or delete it"


def read_done(
    path: Path, prompts: list[Prompt], num_samples: int, runs: dict
) -> tuple[set[tuple], set[tuple]]:
    """The (id, sample) pairs that an output file already has, and the (id, line, error) of prompts
    that were left out; `runs`: id -> the digest of what its lines are made with. Raises UserError
    if the file is not this run's; only then is a last line that a crash cut short taken off."""
    known, done, told = {prompt.id: digest(prompt.prompt) for prompt in prompts}, set(), set()

    def accept(number: int, entry) -> None:
        if "error" in entry:
            left_out = (entry["id"], entry["line"], entry["error"])
            if tuple(map(type, left_out)) not in ((str, int, str), (int, int, str)):
                raise TypeError
            told.add(left_out)
            return
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
    return done, told


@dataclass(frozen=True)
class Missing:
    """What an output lacks. prompts: those to run, and encoded, their token ids; limits, runs: by
    id, most new tokens and the digest of the settings; bad: prompts of all `total` that are left
    out, and told, what the output says of such."""

    prompts: list[Prompt]
    encoded: list[list[int]]
    limits: dict
    runs: dict
    done: set[tuple]  # (id, sample) pairs
    num_samples: int
    bad: list[Prompt]
    told: set[tuple]
    total: int

    def __bool__(self) -> bool:
        return bool(self.prompts or self.errors())

    @property
    def count(self) -> int:
        """Texts to write."""
        pairs = ((p.id, i) for p in self.prompts for i in range(self.num_samples))
        return sum(pair not in self.done for pair in pairs)

    def line(self, prompt: Prompt, sample: int, one: dict) -> str | None:
        """What is to be written of a text that ended (the fields of Generated); None: it was."""
        if (prompt.id, sample) in self.done:
            return None
        entry = {"id": prompt.id, "sample": sample, "prompt": prompt.prompt, **one}
        return json.dumps({**entry, "run": self.runs[prompt.id]}, ensure_ascii=False)

    def errors(self) -> list[str]:
        """A line for each prompt that is left out, unless it is there."""
        new = [p for p in self.bad if (p.id, p.line, p.error) not in self.told]
        entries = ({"id": p.id, "line": p.line, "error": p.error} for p in new)
        return [json.dumps(entry, ensure_ascii=False) for entry in entries]


def find_missing(
    engine: Engine,
    prompts: list[Prompt],
    policy: Policy,
    read: Callable[[list[Prompt], int, dict], tuple[set[tuple], set[tuple]]],
    max_new_tokens: int,
    sampling: Sampling,
    num_samples: int,
    skip_invalid: bool,
    options: dict,
) -> Missing:
    """read: `read_done` of the output. Raises UserError for prompts that cannot be run, unless they
    are left out. The engine's weights are not used."""
    valid = [prompt for prompt in prompts if not prompt.error]
    limits = {prompt.id: prompt.max_new_tokens or max_new_tokens for prompt in valid}
    runs = _runs(engine, policy, sampling, limits, options)
    done, told = read(valid, num_samples, runs)
    # A prompt is run again whole if a sample of it is missing: samples share their prefill.
    left = [p for p in prompts if any((p.id, i) not in done for i in range(num_samples)) or p.error]
    asked = {name: options[name] for name in ("system", "raw", "think") if name in options}
    left, encoded, bad = encode_all(engine, policy, left, **asked)
    refuse(bad, len(prompts), skip_invalid)
    return Missing(left, encoded, limits, runs, done, num_samples, bad, told, len(prompts))


def announce(missing: Missing, output: Path) -> None:
    bad, total = len(missing.bad), missing.total
    wrong = f", and what is wrong with {bad} of {total} prompts" if bad else ""
    print(f"writing {missing.count} texts to {output}{wrong}", file=sys.stderr, flush=True)


def run_batch(
    engine: Engine,
    prompts: list[Prompt],
    policy: Policy,
    output: Path,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    num_samples: int = 1,
    quiet: bool = False,
    skip_invalid: bool = False,
    **options,
) -> Result | None:
    """Writes to `output` what it lacks; None if it is complete. skip_invalid: of a prompt that
    cannot be run, a line with the reason. Options: Engine.generate's."""
    sampling = Sampling.of(sampling, {}, engine.text)
    missing = find_missing(
        engine, prompts, policy, partial(read_done, output), max_new_tokens, sampling,
        num_samples, skip_invalid, options,
    )  # fmt: skip
    left, tokens = missing.prompts, 0
    if not missing:
        return None
    if not quiet:
        announce(missing, output)

    def on_token(index: int, token: int) -> None:
        nonlocal tokens
        tokens += 1

    def on_step(cache) -> None:
        rate = tokens / max(1e-9, bar.format_dict["elapsed"] or 0)
        kv = kv_bytes(cache) / 1e6
        bar.set_postfix_str(f"{rate:.1f} tokens/s, KV {kv:.1f} MB", refresh=False)
        bar.update(0)

    def on_finish(index: int, one) -> None:
        line = missing.line(left[index // num_samples], index % num_samples, asdict(one))
        if line is not None:
            file.write(line)
            bar.update()

    with (
        naming(left),
        Appender(output) as file,
        tqdm(total=missing.count, unit="seq", disable=quiet or None, miniters=0) as bar,
    ):
        for line in missing.errors():
            file.write(line)
        if not left:
            return None
        return engine.generate(
            missing.encoded,
            policy,
            [missing.limits[prompt.id] for prompt in left],
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
