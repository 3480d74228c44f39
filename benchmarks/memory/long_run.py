"""One sequence of 100,000 tokens: do time per token and memory grow, do the invariants hold?

    python -m benchmarks.memory.long_run [--tokens 100000] [--budget 512] [--json FILE]

The model is tiny and random, so most of the time goes to the cache and the engine, not to matrix
products. It has fewer positions than the text has tokens, so positions are compact. Time per token
near the start and at the end is compared in turns: the cache at 2,000 tokens is copied; after the
last token, short windows run from that copy and from the final cache alternately, each on a copy of
its own. The medians over all tokens of all windows are compared. The invariants are checked every
1,000 tokens: budget, positions, storage, scores.
"""

import argparse
import copy
import statistics
import time
from itertools import pairwise
from pathlib import Path

import torch

from benchmarks.common.commands import user_errors
from benchmarks.common.hardware import hardware, resident_bytes
from benchmarks.common.results import write_json
from lethe_mini import Engine, LethePlus, Sampling
from lethe_mini.checkpoint.config import parse_config
from lethe_mini.generation.stats import allocated, kv_bytes
from lethe_mini.kernels import blocks
from lethe_mini.model import Transformer

SIZES = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 4096,
}
EARLY, CHECK, WINDOW = 2_000, 1_000, 384  # tokens; a window has three rounds


def tiny_engine() -> Engine:
    """A random model whose attention has preferences."""
    torch.manual_seed(0)
    model = Transformer(parse_config(SIZES)).requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=2 / parameter.shape[-1] ** 0.5)
    model.init_rope("cpu")
    return Engine(model)


def check_invariants(cache, policy: LethePlus) -> None:
    """Raises AssertionError where one does not hold. A layer grows by at most `interval` tokens
    between two rounds."""
    layers = cache.layers
    held, most = cache.held, len(layers) * (policy.budget + policy.interval)
    assert held <= most, f"the layers hold {held} tokens, more than {most}"
    first = torch.arange(policy.sinks)
    for layer in layers:
        positions, length = layer.positions[0], layer.lengths[0]
        beyond = [tensor[:, :, length:] for tensor in layer.store.values()]
        assert positions.shape[-1] == length, "there are not as many positions as tokens"
        assert (positions.diff() > 0).all(), "positions do not ascend"
        assert (positions[:, : policy.sinks] == first).all(), "a sink is gone"
        assert (positions[:, -1] == cache.seen[0] - 1).all(), "the last token is gone"
        assert layer.capacity <= blocks(length + policy.interval), "capacity exceeds what is needed"
        assert not any(part.any() for part in beyond), "storage beyond the length is not zero"
        for tensor in (layer.keys, layer.values, layer.scores):
            assert tensor.isfinite().all(), "a number is not finite"
        assert (layer.scores >= 0).all(), "a score is negative"


class Watch:
    """Records memory and checks the invariants while the text grows."""

    def __init__(self, policy: LethePlus, points: set[int]):
        self.policy, self.points = policy, points
        self.memory: list[dict] = []
        self.checks = 0

    def on_step(self, cache) -> None:
        seen = cache.seen[0]
        if seen % CHECK == 0:
            check_invariants(cache, self.policy)
            self.checks += 1
        if seen in self.points:
            facts = {"tokens": seen, "held": cache.held, "kv_bytes": kv_bytes(cache)}
            facts |= {"allocated": allocated(cache), "resident": resident_bytes()}
            self.memory.append(facts)


def grow(engine, policy, cache, tokens: int, watch: Watch) -> None:
    """Decodes until the cache has seen `tokens`."""
    new = tokens - cache.seen[0]
    options = {"positions": "compact", "cache": cache, "on_step": watch.on_step}
    engine.generate([[1]], policy, new, Sampling(1.0), **options)


def window(engine, policy, cache) -> list[float]:
    """Seconds of each of the next tokens, on a copy of the cache."""
    with torch.inference_mode():
        cache = copy.deepcopy(cache)
    stamps: list[float] = []
    options = {"positions": "compact", "cache": cache}
    options |= {"on_token": lambda *_: stamps.append(time.perf_counter())}
    engine.generate([[1]], policy, WINDOW, Sampling(1.0), **options)
    return [b - a for a, b in pairwise(stamps)]


def measure(tokens: int, budget: int, windows: int) -> dict:
    engine, policy = tiny_engine(), LethePlus(budget=budget)
    cache = engine.new_cache(policy, "compact")
    # Memory is looked at where a cache is fullest, a token before a round.
    points = {EARLY, *(tokens * i // 10 for i in range(1, 11))}
    watch = Watch(policy, {n - n % policy.interval - 1 for n in points})
    start = time.perf_counter()
    # The last token that `generate` draws is never read, so a segment ends one token early.
    grow(engine, policy, cache, EARLY + 1, watch)
    with torch.inference_mode():
        early = copy.deepcopy(cache)
    grow(engine, policy, cache, tokens, watch)
    seconds = time.perf_counter() - start
    check_invariants(cache, policy)
    first, last = [], []
    for _ in range(windows):
        first += window(engine, policy, early)
        last += window(engine, policy, cache)
    ratio = statistics.median(last) / statistics.median(first)
    return {
        "tokens": cache.seen[0],
        "budget": budget,
        "seconds": seconds,
        "ms_per_token_at_2000": 1e3 * statistics.median(first),
        "ms_per_token_at_end": 1e3 * statistics.median(last),
        "ms_per_token_mean_at_2000": 1e3 * statistics.fmean(first),
        "ms_per_token_mean_at_end": 1e3 * statistics.fmean(last),
        "ratio": ratio,
        "windows": windows,
        "checks": watch.checks,
        "memory": watch.memory,
        "hardware": hardware(),
    }


def show(facts: dict) -> str:
    """A Markdown table and two lines."""
    lines = [
        "| tokens | held per layer | KV kB | allocated kB | process MB |",
        "|---:|---:|---:|---:|---:|",
    ]
    for row in facts["memory"]:
        held = row["held"] / SIZES["num_hidden_layers"]
        sizes = f"{row['kv_bytes'] / 1e3:.1f} | {row['allocated'] / 1e3:.1f}"
        lines.append(f"| {row['tokens']:,} | {held:.0f} | {sizes} | {row['resident'] / 1e6:.1f} |")
    early, late = facts["ms_per_token_at_2000"], facts["ms_per_token_at_end"]
    mean = facts["ms_per_token_mean_at_2000"], facts["ms_per_token_mean_at_end"]
    lines += [
        "",
        f"{facts['tokens']:,} tokens in {facts['seconds']:.0f} s, budget {facts['budget']}, "
        f"{facts['checks']} checks of the invariants passed",
        f"time per token at {EARLY:,}: median {early:.3f} ms (mean {mean[0]:.3f}); at the end: "
        f"median {late:.3f} ms (mean {mean[1]:.3f}); ratio of medians {facts['ratio']:.3f}",
        facts["hardware"],
    ]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--tokens", type=int, default=100_000, help="default: %(default)s")
    add("--budget", type=int, default=512, help="tokens per layer (default: %(default)s)")
    add("--windows", type=int, default=8, help="early and late, each (default: %(default)s)")
    add("--json", type=Path, help="also write the figures, with every setting, to this file")
    args = parser.parse_args(argv)
    if args.tokens <= EARLY + 1:
        parser.error(f"--tokens should be above {EARLY + 1:,}")
    with user_errors():
        facts = measure(args.tokens, args.budget, args.windows)
        print(show(facts))
        write_json(args.json, args, facts)


if __name__ == "__main__":
    main()
