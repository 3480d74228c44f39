"""A decoding step that is captured once and replayed, so that the host stays out of it.

On CUDA a host that launches the kernels of a step one by one takes longer than the device takes to
run them. A CUDA graph holds all of them; the host launches the graph. It reads and writes the very
tensors that were there when it was captured, so a step is captured anew once one of them has moved.

Set LETHE_MINI_CAPTURE=0 to run every step kernel by kernel, as other devices do.
"""

import functools
import os
import time
import weakref
from collections.abc import Callable

import torch
from torch import Tensor

from ..cache import KVCache
from ..errors import UserError


def capture_on_cuda(step: Callable[[], None], before):
    """A graph of the step, which is not run; it takes the memory of the one before, if any."""
    graph, stream = torch.cuda.CUDAGraph(), _stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        pool = None if before is None else before.pool()
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        try:
            step()
        finally:
            graph.capture_end()
    torch.cuda.current_stream().wait_stream(stream)
    return graph


@functools.cache
def _stream() -> torch.cuda.Stream:
    """Captures share memory, and so a stream."""
    return torch.cuda.Stream()


CAPTURE = {"cuda": capture_on_cuda}  # device -> (step, graph before) -> something with replay()


class Replayed:
    """One decoding step, called again and again. step: the device's work, and the cache's counts.

    seconds: what capturing took.
    """

    def __init__(self, step: Callable[[], None], device: torch.device):
        self.step, self.seconds = step, 0.0
        off = os.environ.get("LETHE_MINI_CAPTURE") == "0"
        self.capture = None if off else CAPTURE.get(device.type)
        self.graph = self.cache = self.places = None
        self.warm: set[tuple] = set()  # shapes that a step has run with

    def __call__(self, cache: KVCache, *inputs: Tensor) -> None:
        """One step. inputs: what the step reads and writes beside the cache."""
        cache.reserve(1)
        if self.capture is None:
            return self.step()
        now = (weakref.ref(cache), cache.changes)
        if now == self.cache:  # nothing has moved
            cache.count(1)
            return self.graph.replay()
        tensors = [*inputs, *cache.tensors()]
        places = [(tensor.data_ptr(), tensor.shape) for tensor in tensors]
        if places == self.places:  # a round moved tokens, and no storage
            cache.count(1)
        elif (shapes := tuple(tensor.shape for tensor in tensors)) in self.warm:
            self._capture()  # counts, too
        else:  # compilers and libraries get ready for these shapes
            self.warm.add(shapes)
            return self.step()
        self.cache, self.places = now, places
        return self.graph.replay()

    def _capture(self) -> None:
        """The step's Python runs here; the device runs it at the replay."""
        started = time.perf_counter()
        try:
            self.graph = self.capture(self.step, self.graph)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise UserError(
                f"this step cannot be captured ({str(error).splitlines()[0]}); "
                "set LETHE_MINI_CAPTURE=0 to run it kernel by kernel"
            ) from error
        self.seconds += time.perf_counter() - started
