"""CUDA graphs for a machine without CUDA: what PyTorch does is written down once, then done again.

`capture` runs a step and notes every operation with the very tensors that it read and wrote, then
puts everything back, as a capture on CUDA computes nothing. `replay` repeats the operations,
without the step's Python, into the same tensors. So a step that took a number from the host repeats
that number, and one whose tensors have moved writes where they no longer are: as on CUDA.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
# They read a tensor's numbers, or make a shape that depends on them.
WAITS = (aten._local_scalar_dense, aten.item, aten.nonzero, aten.masked_select, aten._unique2)
INDEXED = (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_)


class Unwaited(TorchDispatchMode):
    """Refuses what has the host wait for the device; counts the operations."""

    operations = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.operations += 1
        masks = args[1] if function.overloadpacket in INDEXED else ()
        by_mask = any(x is not None and x.dtype == torch.bool for x in masks)
        assert function.overloadpacket not in WAITS, f"{function} waits for the device"
        assert not by_mask, f"{function} by a mask waits for the device"
        return function(*args, **(kwargs or {}))


class HostFree(Unwaited):
    """Refuses also tensors of the host's numbers, and copies from one device to another."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function.overloadpacket != aten.lift_fresh, "a tensor of the host's numbers"
        places = [x.device for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        places += [(kwargs or {}).get("device") or place for place in places[:1]]
        kinds = {torch.device(place).type for place in places}
        assert len(kinds) < 2, f"{function} between devices"
        return super().__torch_dispatch__(function, types, args, kwargs)


class Tape(HostFree):
    """The operations of one step."""

    def __init__(self):
        super().__init__()
        self.replays, self.notes = 0, []
        self.before = {}  # address -> (a storage, its bytes before)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        for argument, value in zip(function._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                for x in (x for x in tree_leaves(value) if isinstance(x, torch.Tensor)):
                    storage = x.untyped_storage()
                    self.before.setdefault(storage.data_ptr(), (storage, storage.clone()))
        out = super().__torch_dispatch__(function, types, args, kwargs)
        self.notes.append((function, args, kwargs, out))
        return out

    def rewind(self):
        """Puts back what the step wrote."""
        for storage, bytes_before in self.before.values():
            storage.copy_(bytes_before)
        self.before = {}

    def replay(self):
        """Does the operations again, into the tensors that they made."""
        self.replays += 1
        for function, args, kwargs, out in self.notes:
            again = function(*args, **kwargs)
            pairs = zip(tree_leaves(out), tree_leaves(again), strict=True)
            for old, new in pairs:
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def capture(step, before=None):
    """For `generation.capture.CAPTURE`: a tape of the step, which has changed nothing."""
    tape = Tape()
    with tape:
        step()
    tape.rewind()
    return tape
