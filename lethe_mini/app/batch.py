"""Many prompts from a file, results to a file, one JSON object a line; goes on where it stopped.

A line is written whole or not at all, as soon as its sequence ends. Every line names the settings
it was made with, so that a second run with the same prompts and settings completes the file, and
one with others is refused. A prompt that is left out has a line that says why; once the prompt is
mended, its result follows.
"""

import json
import sys
from dataclasses import asdict
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
    valid = [prompt for prompt in prompts if not prompt.error]
    limits = {prompt.id: prompt.max_new_tokens or max_new_tokens for prompt in valid}
    runs = _runs(engine, policy, sampling, limits, options)
    done, told = read_done(output, valid, num_samples, runs)
    # A prompt is run again whole if a sample of it is missing: samples share their prefill.
    left = [p for p in prompts if any((p.id, i) not in done for i in range(num_samples)) or p.error]
    asked = {name: options[name] for name in ("system", "raw", "think") if name in options}
    left, encoded, bad = encode_all(engine, policy, left, **asked)
    refuse(bad, len(prompts), skip_invalid)
    new = [p for p in bad if (p.id, p.line, p.error) not in told]
    if not left and not new:
        return None
    missing = sum((p.id, i) not in done for p in left for i in range(num_samples))
    tokens = 0
    if not quiet:
        wrong = f", and what is wrong with {len(bad)} of {len(prompts)} prompts" if bad else ""
        print(f"writing {missing} texts to {output}{wrong}", file=sys.stderr, flush=True)

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
        naming(left),
        Appender(output) as file,
        tqdm(total=missing, unit="seq", disable=quiet or None, miniters=0) as bar,
    ):
        for p in new:
            entry = {"id": p.id, "line": p.line, "error": p.error}
            file.write(json.dumps(entry, ensure_ascii=False))
        if not left:
            return None
        return engine.generate(
            encoded,
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
