"""The command line: parse, run, print. `python generate.py` and `lethe-mini` are the same.

The options of the policies, their defaults and their help are read from the dataclasses. Text goes
to standard output as it is made, the report to standard error. What a user can mend ends in one
line and exit code 2; Ctrl-C keeps the text so far and ends with 130. Without a model and a prompt
the small reasoner that ships with the package solves a problem made from the seed.
"""

import argparse
import json
import os
import random
import sys
from contextlib import suppress
from dataclasses import fields
from pathlib import Path

from ..engine import Engine
from ..errors import UserError
from ..generation.requests import POSITIONS
from ..generation.sampling import check_sampling
from ..lens.page import write_page
from ..lens.trace import Trace
from ..policies import POLICIES
from ..policy import Lethe, Policy
from ..reasoner.problems import FAMILIES, TRAINED, Problem, check, problem
from .batch import Prompt, read_prompts, run_batch
from .chat import Conversation, chat

# Options that go to Engine.generate as they are; in a conversation less those of a batch.
GENERATE = (
    "temperature", "top_k", "top_p", "seed", "num_samples", "batch_size", "ignore_eos", "system",
    "raw", "positions", "prefill_chunk",
)  # fmt: skip
BATCH = ("num_samples", "batch_size", "raw")
MAX_NEW_TOKENS, SPARE = 512, 50  # SPARE: beyond what a right solution takes
PROMPT = "Explain, step by step, why the sky is blue and sunsets are red."


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message} (see --help)")


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        description="Write text with a Llama or Qwen2 model while a policy, such as Lethe "
        "(arXiv 2511.06029), prunes its KV cache."
    )
    add = parser.add_argument
    add("--model", help="folder, hub id, reasoner or demo (default: reasoner, which sets itself a "
        "problem; with a prompt, demo)")  # fmt: skip
    add("--revision", help="branch, tag or commit of a hub id")
    add("--prompt", action="append", help="a prompt; several are one batch")
    add("--prompt-file", type=Path, help="one prompt a line; .jsonl: objects with prompt, id, ...")
    add("--interactive", action="store_true", help="a chat that keeps its cache; /exit ends it")
    add("--raw", action="store_true", help="no chat template: continue the text as it stands")
    add("--system", help="a system message before the prompt")
    add("--max-new-tokens", type=int, help=f"at most so many (default: {MAX_NEW_TOKENS}); without "
        "a prompt the reasoner takes what its problem does")  # fmt: skip
    add("--ignore-eos", action="store_true", help="write on after the end of text")
    add("--temperature", type=float, default=0.0, help="0 is greedy (default: %(default)s)")
    add("--top-p", type=float, default=1.0, help="sample from this share (default: %(default)s)")
    add(
        "--top-k", type=int, default=0, help="sample from the k best, 0: all (default: %(default)s)"
    )
    add("--seed", type=int, default=0, help="seed of the draws (default: %(default)s)")
    add("--device", default="auto", help="auto, cpu, cuda, mps (default: %(default)s)")
    add("--dtype", default="auto", help="auto, float32, bfloat16, float16 (default: %(default)s)")
    add("--compile", action="store_true", help="torch.compile: slow to start, faster after")
    add("--positions", default="absolute", choices=POSITIONS,
        help="compact: re-rotate keys to their slots, to outgrow the model's positions "
        "(default: %(default)s)")  # fmt: skip
    add(
        "--prefill-chunk",
        type=int,
        default=512,
        help="prompt tokens at once (default: %(default)s)",
    )
    add("--num-samples", type=int, default=1, help="texts per prompt (default: %(default)s)")
    add("--batch-size", type=int, help="sequences at once (default: all)")
    add("--output", type=Path, help="write results to this JSON Lines file; goes on if it is there")
    add("--stats", type=Path, help="write statistics and sequences to this JSON file")
    add("--trace", type=Path, help="write what every round kept and dropped to this JSON file")
    add("--lens", type=Path, help="write a page that shows it to this HTML file")
    add("--quiet", action="store_true", help="no report")

    group = parser.add_argument_group("policy", "what stays in the cache")
    group.add_argument("--lethe", action="store_true", help="short for --policy lethe")
    group.add_argument("--policy", default=None, help=f"{', '.join(POLICIES)} (default: full)")
    group.add_argument("--paper", action="store_true", help="Lethe exactly as the paper reads")
    for name, (spec, owners) in _policy_options().items():
        flag = "--" + name.replace("_", "-")
        words = ", ".join(spec.metadata["choices"] or ())
        text = f"{spec.metadata['help']}{': ' + words if words else ''} ({_defaults(owners)})"
        kind = {"type": int if spec.default is None else type(spec.default)}
        if kind["type"] is bool:
            kind = {"action": argparse.BooleanOptionalAction}
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
    everybody = sum(len(who) for who in owners.values()) == len(POLICIES) - 1  # all but full
    if everybody and len(owners) == 1:
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
    policy = Lethe.paper(**given) if args.paper else kind(**given)
    if "budget" in known - given.keys() and name != "lethe":  # it alone can do without
        raise UserError(f"policy {name} prunes to a budget; give one (--budget N)")
    return policy


def gather_prompts(args: argparse.Namespace) -> list[Prompt]:
    """Those of --prompt, then those of --prompt-file; without either, the default one."""
    prompts = [Prompt(number, text) for number, text in enumerate(args.prompt or [], 1)]
    if args.prompt_file is not None:
        if prompts:
            raise UserError("give --prompt or --prompt-file, not both")
        prompts = read_prompts(args.prompt_file)
    return prompts or [Prompt(1, PROMPT)]


def own_problem(args: argparse.Namespace, policy: Policy) -> Problem | None:
    """What the reasoner is to solve where nothing was asked: the first of those drawn from the seed
    whose prompt the policy has room for."""
    asked = args.prompt or args.prompt_file is not None or args.interactive
    if asked or args.model not in (None, "reasoner"):
        return None
    rng = random.Random(args.seed)
    for _ in range(100):
        family = rng.choice(list(FAMILIES))
        own = problem(family, rng, rng.choice(TRAINED[family]))
        with suppress(UserError):
            policy.check(len(own.prompt.split()))  # a word, a token
            break
    return own


def verdict(own: Problem, result) -> str:
    """Was the problem solved?"""
    texts = [one.text for one in result.sequences]
    right = sum(check(own, text) for text in texts)
    found = "right" if right == len(texts) else f"wrong in {len(texts) - right} of {len(texts)}"
    return f"the answer is {found}: {own.answer} ({own.family}, {own.size} steps)"


class _Screen:
    """Prints a single sequence as it grows; of several, each whole when it ends."""

    def __init__(self, engine: Engine, prompts: list[Prompt], num_samples: int):
        self.names = [
            f"{prompt.id}" + (f", sample {sample + 1}" if num_samples > 1 else "")
            for prompt in prompts
            for sample in range(num_samples)
        ]
        self.left = set(range(len(self.names)))
        self.stream = engine.text.stream() if len(self.names) == 1 else None

    def on_token(self, index: int, token: int) -> None:
        if self.stream is not None:
            print(self.stream.push(token), end="", flush=True)

    def on_finish(self, index: int, one) -> None:
        self.left.discard(index)
        if self.stream is not None:
            print(self.stream.flush(), flush=True)
        else:
            print(f"--- {self.names[index]} ---\n{one.text}", flush=True)

    def close(self, result) -> None:
        """What an interruption left: the text so far."""
        for index in sorted(self.left):
            if result.sequences[index].token_ids:
                self.on_finish(index, result.sequences[index])


def report(result) -> str:
    """The short report of a run."""
    stats, tokens = result.stats, sum(one.generated_tokens for one in result.sequences)
    lines = [
        f"{tokens} tokens, {stats.decode_tokens_per_second:.1f} tokens/s "
        f"(prefill {stats.prefill_seconds:.2f} s, decode {stats.decode_seconds:.2f} s, "
        f"pruning {stats.prune_seconds:.2f} s)",
        f"KV memory: {_size(stats.kv_bytes_final)} kept at the end where a full cache holds "
        f"{_size(stats.kv_bytes_full)} ({stats.kv_reduction:.1%} less); at most "
        f"{_size(stats.kv_bytes_peak)} at a time; the process had {_size(stats.memory_peak)}",
        f"policy {stats.policy['name']}: {stats.rounds} rounds, {stats.evicted_tokens} evicted, "
        f"{stats.kv_tokens_mean:.0f} tokens held per layer on average",
    ]
    if stats.compile_seconds:
        lines.insert(1, f"compiling took {stats.compile_seconds:.0f} s, not counted as decoding")
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
    # What the terminal cannot show, or sends that is no text, must not end the run.
    for stream, errors in ((sys.stdout, "replace"), (sys.stdin, "surrogateescape")):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=errors)
    policy, prompts = build_policy(args), gather_prompts(args)
    own = own_problem(args, policy)
    most = MAX_NEW_TOKENS if args.max_new_tokens is None else args.max_new_tokens
    check_sampling(args.temperature, args.top_k, args.top_p)
    traced = args.trace or args.lens
    elsewhere = (args.prompt, args.prompt_file, args.output, args.stats, traced, args.raw)
    if args.interactive and any(elsewhere):
        raise UserError(
            "--interactive takes its prompts from you, through the chat template: it goes without "
            "--prompt, --prompt-file, --output, --stats, --trace, --lens and --raw"
        )
    if args.output is not None and traced:
        raise UserError("--output may go on with an older run: it goes without --trace and --lens")
    files = [path for path in (args.stats, args.trace, args.lens) if path is not None]
    if len({path.absolute() for path in files}) < len(files):
        raise UserError(f"{files[-1]} is named twice; give each output a file of its own")
    for path in files:  # found out now, not after minutes of work
        existed = path.exists()
        _write(path, "", "a")
        if not existed:
            path.unlink(missing_ok=True)
    model = args.model
    if model is None:
        model = "demo" if own is None else "reasoner"
    engine = Engine.from_pretrained(model, args.device, args.dtype, args.revision, args.compile)
    if own is not None:
        if args.max_new_tokens is None:
            most = len(engine.text.encode(own.chain)) + SPARE
        prompts = [Prompt(1, own.prompt)]
        if not args.quiet:
            print(own.prompt, file=sys.stderr, flush=True)
    options = {name: getattr(args, name) for name in GENERATE}
    if args.interactive:
        options = {k: v for k, v in options.items() if k not in BATCH}
        return chat(Conversation(engine, policy, max_new_tokens=most, **options))
    if args.output is not None:
        result = run_batch(engine, prompts, policy, args.output, most,
                           quiet=args.quiet, **options)  # fmt: skip
        if result is None:
            print(f"{args.output} is complete", file=sys.stderr)
            return 0
    else:
        screen, trace = _Screen(engine, prompts, args.num_samples), Trace() if traced else None
        result = engine.generate(
            [prompt.text for prompt in prompts],
            policy,
            [prompt.max_new_tokens or most for prompt in prompts],
            on_token=screen.on_token,
            on_finish=screen.on_finish,
            trace=trace,
            **options,
        )
        screen.close(result)
        if args.trace is not None:
            trace.write(args.trace)
        if args.lens is not None:
            write_page([trace], args.lens)
    if args.stats is not None:
        _write(args.stats, json.dumps(result.to_dict(), indent=1) + "\n")
    if not args.quiet:
        print(report(result), file=sys.stderr)
        if own is not None:
            print(verdict(own, result), file=sys.stderr)
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
