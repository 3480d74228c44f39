"""One sequence, 100,000 tokens: does time per token or memory grow, do the invariants drift?

    python -m benchmarks.memory.long_run [--tokens 100000] [--budget 512] [--json FILE]

The model is tiny and random, so that what is measured is the cache and the engine, not matrix
products; it has fewer positions than the text has tokens, so positions are compact. Time per token
near the start and at the end is compared fairly: the cache as it was at 2,000 tokens is put aside,
and after the last token short windows from that one and from the last one take turns, each on a
copy; what is compared is the medians over all tokens of all windows. The invariants are checked
every 1,000 tokens: budget, positions, storage, scores, and keys against positions.
"""

import argparse
import copy
import json
import statistics
import time
from itertools import pairwise
from pathlib import Path

import torch

from lethe_mini import Engine, Lethe
from lethe_mini.cache import blocks
from lethe_mini.checkpoint.config import parse_config
from lethe_mini.generation.stats import allocated, kv_bytes
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


def resident() -> int:
    """Bytes that the process has in memory now; 0 where the system does not say (no Linux)."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    return int(status.partition("VmRSS:")[2].split()[0]) * 1024


def check(cache, policy: Lethe) -> None:
    """The invariants. Between two rounds a layer grows by `interval` tokens at most."""
    layers = cache.layers
    assert cache.held <= len(layers) * (policy.budget + policy.interval), "more than the budget"
    for layer in layers:
        positions, length = layer.positions[0], layer.lengths[0]
        assert positions.shape[-1] == length, "as many positions as tokens"
        assert (positions.diff() > 0).all(), "positions rise"
        assert (positions[:, : policy.sinks] == torch.arange(policy.sinks)).all(), "sinks are there"
        assert (positions[:, -1] == cache.seen[0] - 1).all(), "the last token is there"
        assert layer.capacity <= blocks(length + policy.interval), "no more room than blocks"
        assert all(not t[:, :, length:].any() for t in layer.store.values()), "nothing beyond"
        for tensor in (layer.keys, layer.values, layer.scores):
            assert tensor.isfinite().all(), "numbers"
        assert (layer.scores >= 0).all(), "scores are sums"


class Watch:
    """What is looked at while the text grows: memory and invariants."""

    def __init__(self, policy: Lethe, points: set[int]):
        self.policy, self.points = policy, points
        self.memory: list[dict] = []
        self.checks = 0

    def on_step(self, cache) -> None:
        seen = cache.seen[0]
        if seen % CHECK == 0:
            check(cache, self.policy)
            self.checks += 1
        if seen in self.points:
            facts = {"tokens": seen, "held": cache.held, "kv_bytes": kv_bytes(cache)}
            facts |= {"allocated": allocated(cache), "resident": resident()}
            self.memory.append(facts)


def grow(engine, policy, cache, tokens: int, watch: Watch) -> None:
    """Goes on with the cache until it has seen `tokens`."""
    new = tokens - cache.seen[0]
    options = {"positions": "compact", "temperature": 1.0, "cache": cache}
    engine.generate([[1]], policy, max_new_tokens=new, on_step=watch.on_step, **options)


def window(engine, policy, cache) -> list[float]:
    """Seconds of each of the next tokens, on a copy of the cache."""
    with torch.inference_mode():
        cache = copy.deepcopy(cache)
    stamps: list[float] = []
    options = {"positions": "compact", "temperature": 1.0, "cache": cache}
    options |= {"on_token": lambda *_: stamps.append(time.perf_counter())}
    engine.generate([[1]], policy, max_new_tokens=WINDOW, **options)
    return [b - a for a, b in pairwise(stamps)]


def measure(tokens: int, budget: int, windows: int) -> dict:
    engine, policy = tiny_engine(), Lethe(budget=budget)
    cache = engine.new_cache(policy, "compact")
    # Looked at where a cache is fullest, a token before a round.
    points = {EARLY, *(tokens * i // 10 for i in range(1, 11))}
    watch = Watch(policy, {n - n % policy.interval - 1 for n in points})
    start = time.perf_counter()
    # generate's last token is not read, so a segment ends one short of its goal
    grow(engine, policy, cache, EARLY + 1, watch)
    with torch.inference_mode():
        early = copy.deepcopy(cache)
    grow(engine, policy, cache, tokens, watch)
    seconds = time.perf_counter() - start
    check(cache, policy)
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
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
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
        f"torch {facts['torch']}, {facts['threads']} threads",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=100_000, help="default: %(default)s")
    parser.add_argument("--budget", type=int, default=512, help="default: %(default)s")
    parser.add_argument("--windows", type=int, default=8, help="of each kind (default: 8)")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    args = parser.parse_args()
    if args.tokens <= EARLY + 1:
        parser.error(f"--tokens should be above {EARLY + 1:,}")
    facts = measure(args.tokens, args.budget, args.windows)
    print(show(facts))
    if args.json is not None:
        args.json.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
