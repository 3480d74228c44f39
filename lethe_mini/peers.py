"""Where the devices of one model speak to each other: nowhere, if there is one.

A cache and its layers ask their `peers` for what other devices hold. parallel.py has peers that
answer; these here hand back what they are given.
"""

from torch import Tensor


class Alone:
    """The peers of a model on one device."""

    here = True  # does this device hold the layer?
    first = 0  # the number of the first KV head that this device holds

    def total(self, heads: int) -> int:
        """KV heads of the model, where this device holds so many."""
        return heads

    def heads(self, x: Tensor) -> Tensor:
        """(B, H_kv here, ...) -> (B, H_kv, ...): those of other devices, too."""
        return x

    def layers(self, x: Tensor) -> Tensor:
        """(N, L, ...), right for the layers here -> right for all, and the same on every device."""
        return x


ALONE = Alone()
