"""Who is in which row of a batch, who waits for a row, and when one has ended.

The bookkeeping of `Engine.generate`: no tensor and no policy in it.
"""

import random
from collections import deque
from collections.abc import Callable, Sequence
from itertools import islice

from ..checkpoint.text import Text
from .stats import Generated


class Roster:
    """The sequences of one call, `num_samples` of every prompt. Row r of the batch is live[r].

    lengths, limits: per prompt, its tokens and the most that may follow. A sequence's draws come
    from `seed` and its number among its prompt's samples alone, never from its neighbours.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        limits: Sequence[int],
        num_samples: int,
        seed: int,
        text: Text | None,
        ignore_eos: bool,
        on_token: Callable[[int, int], None] | None,
        on_finish: Callable[[int, Generated], None] | None,
    ):
        self.sequences = [Generated(length) for length in lengths for _ in range(num_samples)]
        self.pending = deque(range(len(self.sequences)))
        self.live: list[int] = []
        self.limits, self.num_samples, self.seed, self.text = limits, num_samples, seed, text
        self.eos = frozenset() if ignore_eos or text is None else text.eos_ids
        self.on_token, self.on_finish = on_token, on_finish
        self.random: dict[int, random.Random] = {}  # of every live sequence

    @property
    def next_prompt(self) -> int:
        return self.pending[0] // self.num_samples

    def samples(self, room: int) -> list[int]:
        """The next prompt's sequences, as many as there is room for."""
        return [i for i in islice(self.pending, room) if i // self.num_samples == self.next_prompt]

    def enter(self, samples: list[int]) -> None:
        """They take rows, behind the others."""
        for index in samples:
            self.pending.popleft()
            self.random[index] = random.Random(f"{self.seed}-{index % self.num_samples}")
        self.live += samples

    def draws(self) -> list[float]:
        """A number in [0, 1) for every row."""
        return [self.random[index].random() for index in self.live]

    def record(self, tokens: list[int], full: list[bool]) -> list[int]:
        """Notes every row's new token; full: has it no position? -> the rows that go on."""
        going = []
        for row, (index, token) in enumerate(zip(self.live, tokens, strict=True)):
            one = self.sequences[index]
            one.token_ids.append(token)
            if token in self.eos:
                one.finish_reason = "stop"
            elif len(one.token_ids) >= self.limits[index // self.num_samples]:
                one.finish_reason = "length"
            elif full[row]:
                one.finish_reason = "positions"
            else:
                going.append(row)
            if self.on_token is not None:
                self.on_token(index, token)
        return going

    def leave(self, rows: list[int]) -> None:
        """All but these rows have ended."""
        gone = [index for row, index in enumerate(self.live) if row not in rows]
        self.live = [self.live[row] for row in rows]
        for index in gone:
            one = self.sequences[index]
            one.generated_tokens = len(one.token_ids)
            one.text = "" if self.text is None else self.text.decode(one.token_ids)
            del self.random[index]
        for index in gone if self.on_finish is not None else ():
            self.on_finish(index, self.sequences[index])

    def interrupt(self) -> None:
        """Whatever has not ended ends as it is, and nobody is told."""
        self.on_finish = None
        for one in self.sequences:
            one.finish_reason = one.finish_reason or "interrupted"
