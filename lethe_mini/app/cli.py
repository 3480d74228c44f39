"""The command line: parse, run, print. `python generate.py` and `lethe-mini` are the same.

Text goes to standard output as it is made, the report to standard error. What a user can mend ends
in one line and exit code 2; Ctrl-C keeps the text so far and ends with 130. Without a model and a
prompt the small model that ships here, the reasoner, solves a puzzle made from the seed.
"""

import argparse
import errno
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..engine import Engine
from ..errors import UserError, check_writable, write_whole
from ..generation.sampling import Sampling
from ..generation.stats import Result
from ..lens.page import write_page
from ..lens.trace import Trace
from ..parallel import lead_or_follow, leave
from ..policy import Policy
from ..reasoner.problems import Problem
from .batch import run_batch
from .chat import Conversation, chat
from .cluster import Cluster, check_folder, is_small, run_cluster, without_weights
from .parser import MAX_NEW_TOKENS, PROMPT, gather_prompts, parse
from .prompts import STDIN, Prompt, encode_all, listed, naming, refuse
from .puzzle import SPARE, TASK, puzzle, verdict
from .screen import Screen, report, say, saying, warnings_in_lines

PLAIN = "this model has no chat template; the prompt is continued as it stands"
NO_MEMORY = ("out of memory", "allocate memory", "ALLOC_FAILED")  # of CUDA and MPS, CPU, cuBLAS


def run(argv: list[str] | None) -> int:
    """One command. -> its exit code. Raises UserError for what the user can mend."""
    _mend_streams()
    args, policy = parse(argv)
    if args.parallel is None or os.environ.get("RANK", "0") == "0":
        return _run(args, policy)
    args.quiet = True  # the first process speaks for the others of a divided model
    try:
        return _run(args, policy)
    except UserError as error:
        return error.code


def _run(args: argparse.Namespace, policy: Policy) -> int:
    prompts = gather_prompts(args)
    Sampling(**_draws(args))  # what it cannot be is refused before a model is loaded
    _check(args)
    own, told = None, ""
    if not prompts and not args.interactive and args.model in (None, "reasoner"):
        own = puzzle(args.seed)
        prompts, told = [Prompt(1, own.prompt)], f"{TASK}\n{own.prompt}"
    model = args.model
    if model is None:
        model = "demo" if own is None else "reasoner"
    smaller = "take a smaller model, --dtype bfloat16, or --device cpu"
    with saying(f"loading {model}", args.quiet), _memory(f"loading {model}", smaller):
        if args.ray is None:
            loading = (model, args.device, args.dtype, args.revision, args.compile, args.parallel)
            engine = Engine.from_pretrained(*loading)
        else:  # the workers have the weights
            engine = without_weights(model, args.device, args.dtype, args.revision)
    if args.template is not None:
        engine.text.choose_template(args.template)
    # The reasoner's puzzles are its own prompts, and need none.
    plain = not (engine.text.has_template or args.raw or model == "reasoner")
    sampling, from_file = _sampling(args, engine)
    lower = "lower --batch-size or --prefill-chunk, or --max-new-tokens or the policy's --budget"
    if args.output is not None:
        lower = f"lower --batch-size or --prefill-chunk; {args.output} keeps what is finished"
    if not prompts and not args.interactive:
        prompts, told = [Prompt(1, PROMPT)], f"prompt: {PROMPT}"

    def write() -> int:
        """-> the exit code."""
        if args.interactive:
            say(PLAIN, args.quiet or not plain)
            return _chat(args, engine, policy, sampling)
        result = _write(args, engine, policy, sampling, prompts, told, _most(args, engine, own))
        if result is None:
            say(f"{args.output} is complete")
            return 0
        if args.stats is not None:
            write_whole(args.stats, json.dumps(result.to_dict(), indent=1) + "\n")
        say(PLAIN, args.quiet or not plain)
        say(report(result, policy, from_file), args.quiet)
        if own is not None:
            say(verdict(own, [one.text for one in result.sequences]), args.quiet)
        interrupted = any(one.finish_reason == "interrupted" for one in result.sequences)
        return 130 if interrupted else 0

    guard = _memory("writing", lower)
    with _threads(args.threads, engine):
        if args.parallel is not None:
            return lead_or_follow(engine, policy, write, _tell, guard)
        with guard:
            return write()


def _mend_streams() -> None:
    """What the terminal cannot show, or sends that is no text, must not end the run."""
    for stream, errors in ((sys.stdout, "replace"), (sys.stdin, "surrogateescape")):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=errors)


def _check(args: argparse.Namespace) -> None:
    """Raises UserError for options that do not go together, and for files that cannot be written:
    now, not after minutes of work."""
    traced = args.trace or args.lens
    elsewhere = (args.prompt, args.prompt_file, args.output, args.stats, traced, args.raw)
    if args.interactive and any((*elsewhere, args.skip_invalid)):
        raise UserError(
            "--interactive reads prompts from you, and uses the chat template; leave out --prompt, "
            "--prompt-file, --skip-invalid, --output, --stats, --trace, --lens and --raw"
        )
    if args.ray is not None and (args.prompt_file is None or args.output is None):
        raise UserError("--ray needs --prompt-file and --output, a folder for the results")
    if args.ray is not None and args.parallel is not None:
        raise UserError("--ray is for models that fit one device; leave it or --parallel out")
    if args.ray is not None and (args.stats or traced):
        raise UserError("--ray writes results alone; leave out --stats, --trace and --lens")
    if args.template is not None and args.raw:
        raise UserError("--raw leaves out the chat template; leave out --template")
    if args.output is not None and traced:
        raise UserError("--output may continue an older run; leave out --trace and --lens")
    if args.threads is not None and args.threads < 1:
        raise UserError(f"--threads should be at least 1, not {args.threads}")
    outputs = [p for p in (args.output, args.stats, args.trace, args.lens) if p is not None]
    if STDIN in outputs:
        raise UserError("- is no output file; text goes to standard output without it")
    read = [] if args.prompt_file in (None, STDIN) else [args.prompt_file]
    places: set[str] = set()
    for path in [*read, *outputs]:
        place = os.path.realpath(path)
        device = os.path.exists(place) and not os.path.isfile(place)
        if place in places and not device:
            raise UserError(f"{path} is named twice; give each output a file of its own")
        places.add(place)
    for path in outputs:
        check_writable(path) if args.ray is None else check_folder(path)


@contextmanager
def _memory(doing: str, mend: str) -> Iterator[None]:
    """Around what may need more memory than there is, which becomes a UserError."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # PyTorch's own is a RuntimeError
        if isinstance(error, MemoryError) or any(sign in str(error) for sign in NO_MEMORY):
            raise UserError(f"out of memory while {doing}; {mend}") from None
        raise


@contextmanager
def _threads(count: int | None, engine: Engine) -> Iterator[None]:
    """Within it, PyTorch uses so many CPU threads; None: one for a small model, else all."""
    before = torch.get_num_threads()
    if count is None:
        count = 1 if is_small(engine) and engine.device.type == "cpu" else before
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _most(args: argparse.Namespace, engine: Engine, own: Problem | None) -> int:
    """New tokens at most, where a prompt's own line does not say."""
    if args.max_new_tokens is not None:
        return args.max_new_tokens
    return MAX_NEW_TOKENS if own is None else len(engine.text.encode(own.chain)) + SPARE


def _draws(args: argparse.Namespace) -> dict:
    """The fields of Sampling that the options give."""
    fields = {name: getattr(args, name) for name in ("temperature", "top_p", "top_k", "seed")}
    return {name: value for name, value in fields.items() if value is not None}


def _sampling(args: argparse.Namespace, engine: Engine) -> tuple[Sampling, list[str]]:
    """How tokens are chosen, and the fields of it that generation_config.json decides. Says what
    else that file asks for in vain."""
    given, text = _draws(args), engine.text
    sampling = Sampling.of(None, given, text)
    own = [name for name in text.sampling if name not in given] if sampling.temperature else []
    if own and text.repetition_penalty != 1:
        penalty = f"repetition_penalty {text.repetition_penalty}"
        say(f"generation_config.json asks for {penalty}, which is not applied", args.quiet)
    return sampling, own


def _options(args: argparse.Namespace) -> dict:
    """Options that go to Engine.generate as they are, in a conversation too."""
    names = ("ignore_eos", "system", "think", "positions", "prefill_chunk")
    return {name: getattr(args, name) for name in names}


def _chat(args: argparse.Namespace, engine: Engine, policy: Policy, sampling: Sampling) -> int:
    most = _most(args, engine, None)
    options = {"max_new_tokens": most, "sampling": sampling, **_options(args)}
    return chat(Conversation(engine, policy, **options))


def _write(
    args: argparse.Namespace,
    engine: Engine,
    policy: Policy,
    sampling: Sampling,
    prompts: list[Prompt],
    told: str,
    most: int,
) -> Result | None:
    """Writes what is asked for: to --output, or to the screen with --trace and --lens. None: the
    file of --output has it all. told: a prompt that was chosen here, shown before the text."""
    options = {"num_samples": args.num_samples, "batch_size": args.batch_size, "raw": args.raw}
    options |= _options(args)
    doing = "compiling; this takes about half a minute" if args.compile else "reading the prompt"
    if args.output is not None:
        options |= {"quiet": args.quiet, "skip_invalid": args.skip_invalid}
        if args.ray is not None:
            how = (args.device, args.revision, args.compile, args.threads)
            cluster = Cluster.of(args.ray, engine, Engine.from_pretrained, *how)
            return run_cluster(
                cluster, engine, prompts, policy, args.output, most, sampling, **options
            )
        return run_batch(engine, prompts, policy, args.output, most, sampling, **options)
    asked = {"system": args.system, "raw": args.raw, "think": args.think}
    good, encoded, bad = encode_all(engine, policy, prompts, **asked)
    refuse(bad, len(prompts), args.skip_invalid)
    for line in listed(bad):
        say(f"left out: {line}")
    trace = Trace() if args.trace or args.lens else None
    with saying(doing, args.quiet) as begun:

        def on_first() -> None:
            begun()
            say(told, args.quiet or not told)

        with naming(good), Screen(engine, good, args.num_samples, on_first) as screen:
            result = engine.generate(
                encoded,
                policy,
                [prompt.max_new_tokens or most for prompt in good],
                sampling,
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
    return result


def main(argv: list[str] | None = None) -> int:
    code = _main(argv)
    leave(code)
    return code


def _main(argv: list[str] | None) -> int:
    try:
        with warnings_in_lines():
            return run(argv)
    except UserError as error:
        _tell(error)
        return error.code
    except KeyboardInterrupt:  # before there was any text
        return 130
    except BrokenPipeError:  # `| head` has read enough
        _close_output()
        return 0
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        _close_output()
        print(f"error: cannot write the text: {error.strerror}", file=sys.stderr)
        return 2


def _tell(error: UserError) -> None:
    """What the user can mend, a line each."""
    for line in error.lines():
        print("error:", line, file=sys.stderr)


def _close_output() -> None:
    """What it could not take is gone, and Python must not try again when it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
