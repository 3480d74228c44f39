"""The command line: parse, run, print. `python generate.py` and `lethe-mini` are the same.

The options of the policies, their defaults and their help are read from the dataclasses. Text goes
to standard output as it is made, the report to standard error. What a user can mend ends in one
line and exit code 2; Ctrl-C keeps the text so far and ends with 130.
"""

import argparse
import json
import os
import sys
from dataclasses import fields
from pathlib import Path

from .baselines import POLICIES
from .engine import POSITIONS, Engine, pick_device
from .errors import UserError
from .policy import Lethe, Policy
from .sampling import check_sampling

PROMPT = "Explain, step by step, why the sky is blue and sunsets are red."


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message} (see --help)")


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="generate.py", description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--model", default="demo", help="folder, hub id, or demo (default: %(default)s)")
    add("--revision", help="branch, tag or commit of a hub id")
    add("--prompt", action="append", help="a prompt; several are one batch")
    add("--prompt-file", type=Path, help="a file with one prompt, UTF-8")
    add("--raw", action="store_true", help="no chat template: continue the text as it stands")
    add("--system", help="a system message before the prompt")
    add("--max-new-tokens", type=int, default=512, help="at most so many (default: %(default)s)")
    add("--ignore-eos", action="store_true", help="write on after the end of text")
    add("--temperature", type=float, default=0.0, help="0 is greedy (default: %(default)s)")
    add("--top-p", type=float, default=1.0, help="sample from this share (default: %(default)s)")
    add(
        "--top-k", type=int, default=0, help="sample from the k best, 0: all (default: %(default)s)"
    )
    add("--seed", type=int, default=0, help="seed of the draws (default: %(default)s)")
    add("--device", default="auto", help="auto, cpu, cuda, mps (default: %(default)s)")
    add("--dtype", default="auto", help="auto, float32, bfloat16, float16 (default: %(default)s)")
    add("--positions", default="absolute", choices=POSITIONS,
        help="compact: re-rotate keys to their slots, to outgrow the model's positions "
        "(default: %(default)s)")  # fmt: skip
    add(
        "--prefill-chunk",
        type=int,
        default=512,
        help="prompt tokens at once (default: %(default)s)",
    )
    add("--stats", type=Path, help="write statistics and sequences to this JSON file")
    add("--quiet", action="store_true", help="no report")

    group = parser.add_argument_group("policy", "what stays in the cache")
    group.add_argument("--lethe", action="store_true", help="short for --policy lethe")
    group.add_argument("--policy", default=None, help=f"{', '.join(POLICIES)} (default: full)")
    group.add_argument("--paper", action="store_true", help="Lethe exactly as the paper reads")
    for name, (spec, owners) in _policy_options().items():
        flag = "--" + name.replace("_", "-")
        words = ", ".join(spec.metadata["choices"] or ())
        text = f"{spec.metadata['help']}{': ' + words if words else ''} ({_defaults(owners)})"
        kind = {"type": spec.metadata.get("type", type(spec.default))}
        if isinstance(spec.default, bool):
            kind = {"action": argparse.BooleanOptionalAction}
        elif spec.default is None:
            kind = {"type": int}
        group.add_argument(flag, default=None, help=text, **kind)
    return parser


def _policy_options() -> dict:
    """name -> (field, {default: policies}) over all policies; --seed is everybody's already."""
    options = {}
    for policy in POLICIES.values():
        for spec in (spec for spec in fields(policy) if spec.name != "seed"):
            _, owners = options.setdefault(spec.name, (spec, {}))
            owners.setdefault(spec.default, []).append(policy.name)
    return options


def _defaults(owners: dict) -> str:
    if len(owners) == 1:
        return f"default: {next(iter(owners))}"
    return "default: " + ", ".join(f"{value} for {'/'.join(who)}" for value, who in owners.items())


def build_policy(args: argparse.Namespace) -> Policy:
    """The policy that the options describe. Raises UserError for one that it does not have."""
    name = args.policy or ("lethe" if args.lethe or args.paper else "full")
    if name not in POLICIES:
        raise UserError(f"no policy {name!r}; there are {', '.join(POLICIES)}")
    if name != "lethe" and (args.lethe or args.paper):
        raise UserError(f"--lethe and --paper do not go with --policy {name}")
    kind, known = POLICIES[name], {spec.name for spec in fields(POLICIES[name])}
    given = {key: getattr(args, key) for key in _policy_options() if getattr(args, key) is not None}
    for key in given:
        if key not in known:
            raise UserError(f"policy {name} has no --{key.replace('_', '-')}; see --help")
    if "seed" in known:
        given["seed"] = args.seed
    return Lethe.paper(**given) if args.paper else kind(**given)


def read_prompts(args: argparse.Namespace) -> list[str]:
    prompts = list(args.prompt or [])
    if args.prompt_file is not None:
        try:
            prompts.append(args.prompt_file.read_text(encoding="utf-8"))
        except UnicodeDecodeError:
            raise UserError(f"{args.prompt_file} is not UTF-8 text; convert it") from None
        except OSError as error:
            raise UserError(f"cannot read {args.prompt_file}: {error.strerror}") from None
    return prompts or [PROMPT]


class _Screen:
    """Prints one sequence as it grows; of a batch, each sequence whole when it ends."""

    def __init__(self, engine: Engine, count: int):
        self.streams = [engine.text.stream() for _ in range(count)]

    def __call__(self, index: int, token: int) -> None:
        piece = self.streams[index].push(token)
        if len(self.streams) == 1:
            print(piece, end="", flush=True)

    def finish(self, result) -> None:
        if len(self.streams) == 1:
            print(self.streams[0].flush(), flush=True)
            return
        for index, one in enumerate(result.sequences):
            print(f"--- {index + 1} ---\n{one.text}", flush=True)


def report(result) -> str:
    """The short report of a run."""
    stats, tokens = result.stats, sum(one.generated_tokens for one in result.sequences)
    lines = [
        f"{tokens} tokens, {stats.decode_tokens_per_second:.1f} tokens/s "
        f"(prefill {stats.prefill_seconds:.2f} s, decode {stats.decode_seconds:.2f} s, "
        f"pruning {stats.prune_seconds:.2f} s)",
        f"KV memory {_size(stats.kv_bytes_final)} kept, {_size(stats.kv_bytes_peak)} at most, "
        f"{_size(stats.kv_bytes_full)} for a full cache ({stats.kv_reduction:.1%} less)",
        f"policy {stats.policy['name']}: {stats.rounds} rounds, {stats.evicted_tokens} evicted, "
        f"{stats.kv_tokens_mean:.0f} tokens held per layer on average",
    ]
    if any(one.finish_reason == "positions" for one in result.sequences):
        lines.append(
            "stopped at the model's last position; --positions compact with a budget goes on"
        )
    return "\n".join(lines)


def _size(count: float) -> str:
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= unit:
            return f"{count / unit:.3g} {name}"
    return f"{count:.0f} B"


def _write(path: Path, text: str, mode: str = "w") -> None:
    try:
        with path.open(mode, encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None


def run(argv: list[str] | None) -> int:
    args = build_parser().parse_args(argv)
    if hasattr(sys.stdout, "reconfigure"):  # what the terminal cannot show must not end the run
        sys.stdout.reconfigure(errors="replace")
    policy, prompts = build_policy(args), read_prompts(args)
    check_sampling(args.temperature, args.top_k, args.top_p)
    if args.stats is not None:  # found out now, not after minutes of work
        existed = args.stats.exists()
        _write(args.stats, "", "a")
        if not existed:
            args.stats.unlink(missing_ok=True)
    pick_device(args.device)
    engine = Engine.from_pretrained(args.model, args.device, args.dtype, args.revision)
    screen = _Screen(engine, len(prompts))
    result = engine.generate(
        prompts,
        policy,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed,
        ignore_eos=args.ignore_eos,
        system=args.system,
        raw=args.raw,
        positions=args.positions,
        prefill_chunk=args.prefill_chunk,
        on_token=screen,
    )
    screen.finish(result)
    if args.stats is not None:
        _write(args.stats, json.dumps(result.to_dict(), indent=1) + "\n")
    if not args.quiet:
        print(report(result), file=sys.stderr)
    interrupted = any(one.finish_reason == "interrupted" for one in result.sequences)
    return 130 if interrupted else 0


def main(argv: list[str] | None = None) -> int:
    try:
        return run(argv)
    except UserError as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # before there was any text
        return 130
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
