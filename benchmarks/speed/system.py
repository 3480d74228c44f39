"""What all measured systems share: greedy decoding timed step by step, and memory.

At import this needs the standard library alone: another engine's interpreter runs it, too.
"""

import contextlib
import ctypes
import gc
import time
from pathlib import Path

from benchmarks.common.hardware import available_bytes, resident_bytes, resident_peak_bytes

GB = 1e9


class OutOfMemoryError(Exception):
    """A request that does not fit into memory; says how much of how much."""


def on_cuda(settings: dict) -> bool:
    return str(settings.get("device", "cpu")).startswith("cuda")


def sync(settings: dict) -> None:
    """Waits until the device has done all its work."""
    if on_cuda(settings):
        import torch

        torch.cuda.synchronize()


def reset_peak(settings: dict) -> None:
    """Begins a new peak. On Linux a process can reset its own."""
    gc.collect()
    if on_cuda(settings):
        import torch

        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return
    with contextlib.suppress(OSError, AttributeError):  # glibc first returns what is free
        ctypes.CDLL(None).malloc_trim(0)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def memory_peak(settings: dict) -> int:
    """The most bytes since `reset_peak`: resident size, or what CUDA's allocator gave out."""
    if on_cuda(settings):
        import torch

        return torch.cuda.max_memory_allocated()
    return resident_peak_bytes()


def resident(settings: dict) -> int:
    """Bytes that the process has now: resident size, or what CUDA's allocator gave out."""
    if on_cuda(settings):
        import torch

        return torch.cuda.memory_allocated()
    return resident_bytes()


def check_room(need: float, settings: dict) -> None:
    """Raises OutOfMemoryError before the kernel would kill this process or another one."""
    free = available_bytes()
    if not on_cuda(settings) and free and need > free:
        raise OutOfMemoryError(f"needs {need / GB:.1f} GB of {free / GB:.1f} GB")


class System:
    """What all systems with a model share: greedy decoding, timed step by step.

    A system defines `load`, `prefill`, `forward` and `held`.
    """

    def __init__(self, settings: dict):
        self.settings = settings
        self.tokens = None  # (B,) the last tokens, not read yet
        self.chosen: list[int] = []  # what the first sequence got since `fill`

    def load(self) -> dict:
        raise NotImplementedError

    def prefill(self, ids: list[int], batch: int) -> float:
        """Reads the prompt and copies its cache for every sequence. -> seconds to the first token.

        Leaves the first tokens of the batch in `tokens`."""
        raise NotImplementedError

    def forward(self) -> list[int]:
        """One step for all sequences: leaves the next tokens, and returns them as numbers."""
        raise NotImplementedError

    def held(self) -> dict:
        """kv_bytes: keys and values of the tokens held; kv_allocated; tokens: a layer's mean."""
        raise NotImplementedError

    def sync(self) -> None:
        sync(self.settings)

    def fill(self, ids: list[int], batch: int) -> dict:
        self.drop()
        reset_peak(self.settings)
        self.chosen = []
        seconds = self.prefill(ids, batch)
        return {"seconds": seconds, **self.state()}

    def steps(self, count: int, warm: int = 1) -> dict:
        """`warm` steps that are not timed, then `count` that are. Before the first, the processor's
        caches hold another system's weights."""
        seconds = []
        for step in range(warm + count):
            self.sync()
            start = time.perf_counter()
            row = self.forward()
            self.sync()
            if step >= warm:
                seconds.append(time.perf_counter() - start)
            self.chosen.append(row[0])
        return {"step_seconds": seconds, **self.state()}

    def state(self) -> dict:
        return {"peak": memory_peak(self.settings), "chosen": self.chosen, **self.held()}

    def drop(self) -> dict:
        self.tokens = self.cache = None
        gc.collect()
        return {}
