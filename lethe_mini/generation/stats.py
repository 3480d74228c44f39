"""What a run gives back: the sequences, and what they cost in time and memory."""

import re
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from ..cache import KVCache
from .requests import Request
from .sampling import Sampling


@dataclass
class Generated:
    """One sequence of a result. finish_reason: "stop" (end of text), "length" (as many tokens as
    asked for), "positions" (the model has no more), "interrupted"."""

    prompt_tokens: int
    generated_tokens: int = 0
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None


@dataclass
class Stats:
    """What a run cost. Bytes are keys and values of held tokens, unless they say otherwise."""

    model: str
    policy: dict
    device: str
    dtype: str
    seed: int
    sampling: dict  # the Sampling in use
    positions: str
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    compile_seconds: float = 0.0  # torch.compile's, beside the two
    decode_tokens_per_second: float = 0.0
    prune_seconds: float = 0.0  # part of prefill and decode
    capture_seconds: float = 0.0  # part of decode: a step's CUDA graphs
    kv_bytes_peak: int = 0
    kv_bytes_final: int = 0  # at the end of each sequence, added up
    kv_bytes_full: int = 0  # what a full cache would hold there
    kv_reduction: float = 0.0  # 1 - final / full
    kv_allocated_peak: int = 0  # all tensors of the cache, spare room and bookkeeping included
    memory_peak: int = 0  # of the process so far: CUDA's allocator, else resident size; 0: unknown
    kv_tokens_mean: float = 0.0  # over steps, layers and sequences
    kv_tokens_final: list[list[int]] = field(default_factory=list)
    rounds: int = 0  # of each sequence, added up
    evicted_tokens: int = 0  # over layers and sequences


def token_bytes(cache: KVCache) -> int:
    """Bytes of one token's key and value in one layer, on all devices."""
    layer = next(layer for layer in cache.layers if layer.peers.here)
    keys = layer.store["keys"]
    return 2 * layer.peers.total(keys.shape[1]) * keys.shape[3] * keys.element_size()


def kv_bytes(cache: KVCache) -> int:
    """Bytes of the keys and values held."""
    return cache.held * token_bytes(cache)


def allocated(cache: KVCache) -> int:
    """Bytes of all tensors with their spare room, positions, scores and past queries included."""
    return sum(t.untyped_storage().nbytes() for t in cache.tensors())


def memory_peak(device: torch.device) -> int:
    """Bytes: the most that the process has had so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")  # Linux: getrusage would count a parent's memory, too
    if status.exists():
        return int(re.search(r"VmHWM:\s+(\d+)", status.read_text()).group(1)) * 1024
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS: in bytes


def compile_seconds() -> float:
    """What torch.compile has taken in this process so far."""
    dynamo = sys.modules.get("torch._dynamo.utils")  # not there: nothing has been compiled
    return dynamo.calculate_time_spent()["total_wall_time"] if dynamo else 0.0


@dataclass
class Result:
    sequences: list[Generated]  # in the order of the prompts
    stats: Stats

    def to_dict(self) -> dict:
        """The statistics, and beside them the sequences: what `--stats` writes."""
        return {**asdict(self.stats), "sequences": [asdict(one) for one in self.sequences]}


class Meter:
    """Counts a run while it goes on."""

    def __init__(self, engine, policy, sampling: Sampling, request: Request, trace=None):
        facts = {"name": policy.name or type(policy).__name__, **asdict(policy)}
        dtype = str(engine.dtype).removeprefix("torch.")
        self.stats = Stats(
            engine.name, facts, str(engine.device), dtype, sampling.seed, asdict(sampling),
            request.positions,
        )  # fmt: skip
        sequences = len(request.prompts) * request.num_samples
        self.stats.kv_tokens_final = [[] for _ in range(sequences)]
        self.device, self.trace = engine.device, trace
        if trace is not None:
            seen = 0 if request.cache is None else request.cache.seen[0]
            trace.begin(engine, policy, request.prompts, request.num_samples, seen)
        self.started = self.prefill_started = time.perf_counter()
        self.compiled = compile_seconds()
        self.tokens = self.held = 0  # held: per layer, summed over tokens
        self.changes, self.evicted = None, 0  # of a cache, at its last change

    def now(self) -> float:
        """Seconds, when the device has done what it was told so far."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def prefill_begins(self) -> None:
        self.prefill_started = self.now()

    def prefill_ends(self) -> None:
        self.stats.prefill_seconds += self.now() - self.prefill_started
        self.changes = None  # perhaps another cache

    def step(self, cache: KVCache) -> None:
        """One token more for every sequence of the cache."""
        if self.changes != cache.changes:
            self.changes, self.evicted = cache.changes, cache.evicted
        self.tokens += len(cache.seen)
        self.held += sum(cache.seen) - self.evicted / len(cache.layers)

    def peak(self, *caches: KVCache) -> None:
        """Looks at the memory. It only grows between rounds and departures, so before is enough."""
        stats = self.stats
        stats.kv_bytes_peak = max(stats.kv_bytes_peak, sum(map(kv_bytes, caches)))
        stats.kv_allocated_peak = max(stats.kv_allocated_peak, sum(map(allocated, caches)))

    def round_begins(self, cache: KVCache, beside: KVCache | None = None) -> None:
        """beside: the batch's cache, where the round is that of a prompt that is about to join."""
        self.peak(*[cache] if beside is None else [cache, beside])
        if self.trace is not None:
            self.trace.round_begins(cache)
        self.held_before, self.round_started = cache.held, self.now()

    def round_ends(self, cache: KVCache, due: list[bool], owners: Sequence[int], done) -> None:
        """Row r of the cache is sequence owners[r]; done: what the policy's round gave back."""
        self.stats.prune_seconds += self.now() - self.round_started
        self.stats.rounds += sum(due)
        self.stats.evicted_tokens += self.held_before - cache.held
        if self.trace is not None:
            self.trace.round_ends(cache, due, owners, done)

    def ends(self, cache: KVCache, roster, going: list[int]) -> None:
        """All rows of the cache but these have ended and are about to leave."""
        self.peak(cache)
        for row, sequence in enumerate(roster.live):
            if row in going:
                continue
            final = [layer.lengths[row] for layer in cache.layers]
            self.stats.kv_tokens_final[sequence] = final
            self.stats.kv_bytes_final += sum(final) * token_bytes(cache)
            self.stats.kv_bytes_full += cache.seen[row] * len(final) * token_bytes(cache)
            if self.trace is not None:
                self.trace.ends(sequence, cache.seen[row], roster.sequences[sequence])

    def close(self, capture_seconds: float) -> Stats:
        stats, full = self.stats, self.stats.kv_bytes_full
        stats.capture_seconds = capture_seconds
        stats.compile_seconds = compile_seconds() - self.compiled
        elapsed = time.perf_counter() - self.started
        stats.decode_seconds = elapsed - stats.prefill_seconds - stats.compile_seconds
        stats.decode_tokens_per_second = self.tokens / max(stats.decode_seconds, 1e-9)
        stats.kv_reduction = 1 - stats.kv_bytes_final / full if full else 0.0
        stats.kv_tokens_mean = self.held / max(1, self.tokens)
        stats.memory_peak = memory_peak(self.device)
        return stats
