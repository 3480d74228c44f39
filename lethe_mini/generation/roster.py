"""Which sequence is in which row of a batch, which ones wait, and when one has ended.

The bookkeeping of `Engine.generate`: no tensor and no policy in it.
"""

import random
from collections import deque
from collections.abc import Callable
from itertools import islice

from ..errors import PromptError
from .requests import Request
from .sampling import NO_TOKEN
from .stats import Generated

NO_LOGITS = (
    "the model's logits are not numbers (NaN or infinite); try another dtype, such as "
    "--dtype float32, or fetch the checkpoint again"
)


class Roster:
    """The sequences of one call, `num_samples` of every prompt. Row r of the batch is live[r].

    text: the engine's, or None. A sequence's draws come from `seed` and its number among its
    prompt's samples alone.
    """

    def __init__(
        self,
        request: Request,
        seed: int,
        text,
        ignore_eos: bool,
        on_token: Callable[[int, int], None] | None,
        on_finish: Callable[[int, Generated], None] | None,
    ):
        self.limits, self.num_samples = request.limits, request.num_samples
        self.prompts = len(request.prompts)
        samples = range(self.num_samples)
        self.sequences = [Generated(len(ids)) for ids in request.prompts for _ in samples]
        self.pending = deque(range(len(self.sequences)))
        self.live: list[int] = []
        self.seed, self.text = seed, text
        self.eos = frozenset() if ignore_eos or text is None else text.eos_ids
        self.on_token, self.on_finish = on_token, on_finish

    @property
    def next_prompt(self) -> int:
        return self.pending[0] // self.num_samples

    def samples(self, room: int) -> list[int]:
        """The next prompt's sequences, as many as there is room for."""
        return [i for i in islice(self.pending, room) if i // self.num_samples == self.next_prompt]

    def enter(self, samples: list[int]) -> None:
        """They take rows, behind the others."""
        for _ in samples:
            self.pending.popleft()
        self.live += samples

    def seeds(self, samples: list[int]) -> list[int]:
        """What each sequence draws from: its own whole number."""
        numbers = [index % self.num_samples for index in samples]
        return [random.Random(f"{self.seed}-{number}").getrandbits(63) for number in numbers]

    def record(self, tokens: list[int], full: list[bool]) -> list[int]:
        """Notes every row's new token; full: is there no further position? -> rows that go on.
        Raises PromptError for a row that has none, before any of them is noted."""
        if NO_TOKEN in tokens:
            number = self.live[tokens.index(NO_TOKEN)] // self.num_samples
            raise PromptError(number, NO_LOGITS, self.prompts == 1)
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
        if self.on_finish is not None:
            for index in gone:
                self.on_finish(index, self.sequences[index])

    def interrupt(self) -> None:
        """Whatever has not ended ends as it is, and nobody is told."""
        self.on_finish = None
        for one in self.sequences:
            one.finish_reason = one.finish_reason or "interrupted"
