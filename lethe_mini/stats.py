"""What a run gives back: the sequences, and what they cost in time and memory."""

import sys
from dataclasses import asdict, dataclass, field

import torch


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
    positions: str
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    decode_tokens_per_second: float = 0.0
    prune_seconds: float = 0.0  # part of the two above
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


def memory_peak(device: torch.device) -> int:
    """Bytes: the most that the process has had so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@dataclass
class Result:
    sequences: list[Generated]  # in the order of the prompts
    stats: Stats

    def to_dict(self) -> dict:
        """The statistics, and beside them the sequences: what `--stats` writes."""
        return {**asdict(self.stats), "sequences": [asdict(one) for one in self.sequences]}
