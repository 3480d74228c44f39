"""What the command shows: text as it is made, on standard output; the rest on standard error."""

import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict

from ..engine import Engine
from ..errors import CheckpointWarning
from ..generation.sampling import Sampling
from ..generation.stats import Result
from ..options import show_budget
from ..policy import Policy, Pruner
from .prompts import Prompt

PATIENCE = 2.0  # seconds of silence before the command says what it is doing


def say(text: str, quiet: bool = False) -> None:
    """A line on standard error."""
    if not quiet:
        print(text, file=sys.stderr, flush=True)


@contextmanager
def warnings_in_lines() -> Iterator[None]:
    """Within it, what a checkpoint contradicts itself in is a line on standard error, once."""
    with warnings.catch_warnings():
        warnings.simplefilter("default", CheckpointWarning)
        others = warnings.showwarning

        def show(message, category, *details) -> None:
            if issubclass(category, CheckpointWarning):
                say(f"warning: {' '.join(str(message).split())}")
            else:
                others(message, category, *details)

        warnings.showwarning = show
        yield


@contextmanager
def saying(text: str, quiet: bool = False) -> Iterator[Callable[[], None]]:
    """Says what goes on if it takes longer than PATIENCE; gives what makes it silent."""
    timer = threading.Timer(PATIENCE, say, (text, quiet))
    timer.daemon = True
    timer.start()
    try:
        yield timer.cancel
    finally:
        timer.cancel()


class Screen:
    """Prints a single sequence as it grows; of several, each whole when it ends. Within it,
    an error ends the line of a text that has begun.

    on_first: called before the first token is printed.
    """

    def __init__(
        self, engine: Engine, prompts: list[Prompt], num_samples: int, on_first: Callable[[], None]
    ):
        self.names = [
            f"{prompt.id}" + (f", sample {sample + 1}" if num_samples > 1 else "")
            for prompt in prompts
            for sample in range(num_samples)
        ]
        self.left = set(range(len(self.names)))
        self.stream = engine.text.stream() if len(self.names) == 1 else None
        self.on_first, self.waits = on_first, True

    def __enter__(self) -> "Screen":
        return self

    def __exit__(self, kind, *_) -> None:
        failed = kind is not None and not issubclass(kind, OSError)  # which a print may have raised
        if failed and self.stream is not None and not self.waits:
            print(self.stream.flush(), flush=True)

    def on_token(self, index: int, token: int) -> None:
        if self.waits:
            self.on_first()
            self.waits = False
        if self.stream is not None:
            print(self.stream.push(token), end="", flush=True)

    def on_finish(self, index: int, one) -> None:
        self.left.discard(index)
        if self.stream is not None:
            print(self.stream.flush(), flush=True)
        else:
            print(f"--- {self.names[index]} ---\n{one.text}", flush=True)

    def close(self, result: Result) -> None:
        """What an interruption left: the text so far."""
        for index in sorted(self.left):
            if result.sequences[index].token_ids:
                self.on_finish(index, result.sequences[index])


def report(result: Result, policy: Policy, from_file: Sequence[str] = ()) -> str:
    """The short report of a run. from_file: fields of its sampling that the model's
    generation_config.json decided."""
    stats, tokens = result.stats, sum(one.generated_tokens for one in result.sequences)
    lines = [
        f"{tokens} tokens, {stats.decode_tokens_per_second:.1f} tokens/s "
        f"(prefill {stats.prefill_seconds:.2f} s, decode {stats.decode_seconds:.2f} s, "
        f"pruning {stats.prune_seconds:.2f} s)"
    ]
    if stats.sampling["temperature"]:
        lines.append(_sampled(stats.sampling, from_file))
    if stats.compile_seconds:
        lines.append(f"compiling took {stats.compile_seconds:.0f} s, not counted as decoding")
    lines.append(
        f"KV memory: {_size(stats.kv_bytes_final)} kept at the end where a full cache holds "
        f"{_size(stats.kv_bytes_full)} ({stats.kv_reduction:.1%} less); at most "
        f"{_size(stats.kv_bytes_peak)} at a time; the process had {_size(stats.memory_peak)}"
    )
    lines.append(_rounds(result, policy))
    if any(one.finish_reason == "positions" for one in result.sequences):
        lines.append(
            "stopped at the model's last position; --positions compact with a budget goes on"
        )
    return "\n".join(lines)


def _sampled(sampling: dict, from_file: Sequence[str]) -> str:
    """What draws the tokens, those things first that generation_config.json decided."""
    off, words = asdict(Sampling()), {}
    for name in ("temperature", "top_p", "top_k"):
        if sampling[name] != off[name]:
            words[name] = f"{name.replace('_', '-')} {sampling[name]:.12g}"
    own = [text for name, text in words.items() if name in from_file]
    parts = [text for name, text in words.items() if name not in from_file]
    if own:
        listed = " and ".join(filter(None, (", ".join(own[:-1]), own[-1])))
        parts.insert(0, f"{listed} (generation_config.json)")
    return f"sampled at {', '.join(parts)}, seed {sampling['seed']}"


def _rounds(result: Result, policy: Policy) -> str:
    """What the policy did, or why it did nothing."""
    stats, name = result.stats, f"policy {result.stats.policy['name']}"
    if not isinstance(policy, Pruner):
        return f"{name}: {stats.kv_tokens_mean:.0f} tokens held per layer on average"
    name += f", budget {show_budget(policy.budget)}"
    rounds = "1 round" if stats.rounds == 1 else f"{stats.rounds} rounds"
    if stats.evicted_tokens:
        return (
            f"{name}: {rounds}, {stats.evicted_tokens} tokens evicted over all layers; "
            f"{stats.kv_tokens_mean:.0f} tokens held per layer on average, with those written "
            "between rounds"
        )
    if policy.budget == 1.0:
        return f"{name}: nothing was pruned, and never is with this budget"
    longest = max(result.sequences, key=lambda one: one.prompt_tokens + one.generated_tokens)
    seen, start = longest.prompt_tokens + longest.generated_tokens, policy.first_round(0)
    start = max(start, policy.first_round(longest.prompt_tokens))
    if stats.rounds:
        return f"{name}: nothing was pruned, since no layer had a breakpoint at {seen} tokens"
    return (
        f"{name}: nothing was pruned; the first round comes {policy.interval} tokens or fewer "
        f"after the first {start}, and the longest text has {seen}"
    )


def _size(count: float) -> str:
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= unit:
            return f"{count / unit:.3g} {name}"
    return f"{count:.0f} B"
