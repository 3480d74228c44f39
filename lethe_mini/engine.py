"""Generation: prefill, then token by token, with rounds of pruning in between.

The engine composes what knows nothing of each other: the model appends to a cache, a policy prunes
it. A batch is many independent requests that share matrix products: every prompt is prefilled
alone, then joins; a sequence that ends leaves, and its memory with it; the next prompt takes its
place. A sequence's output does not depend on what else is in the batch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .cache import KVCache
from .generation.capture import Replayed
from .generation.interrupts import held_back_interrupts
from .generation.requests import Request, read_request
from .generation.roster import Roster
from .generation.sampling import Sampling, sample
from .generation.stats import Generated, Meter, Result
from .kernels import to_device
from .model import Transformer
from .policy import FullKV, Policy


class Engine:
    """A model, its text (checkpoint/text.py; None: prompts are token ids), and `generate`."""

    def __init__(self, model: Transformer, text=None, name: str = ""):
        self.model, self.text, self.name = model.eval(), text, name
        self.device = model.embed_tokens.weight.device
        self.dtype = model.embed_tokens.weight.dtype

    @classmethod
    def from_pretrained(
        cls, model: str, device="auto", dtype="auto", revision=None, compile=False, parallel=None
    ) -> "Engine":
        """model: a folder, a hub id, "reasoner" or "demo"; revision: of a hub id. compile: decode
        through torch.compile, which takes half a minute and on a CPU a C++ compiler. parallel:
        "tensor" or "layers", over torchrun's processes. Raises UserError for what cannot be."""
        from .checkpoint.load import load
        from .checkpoint.text import Text
        from .parallel import load_divided

        if parallel is not None:
            return load_divided(model, device, dtype, revision, compile, parallel)
        folder, transformer = load(model, device, dtype, revision, compile)
        return cls(transformer, Text(folder), model)

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[str | Sequence[dict] | Sequence[int]],
        policy: Policy | None = None,
        max_new_tokens: int | Sequence[int] = 512,
        sampling: Sampling | None = None,
        *,
        num_samples: int = 1,
        batch_size: int | None = None,
        ignore_eos: bool = False,
        system: str | None = None,
        raw: bool = False,
        think: bool | None = None,
        positions: str = "absolute",
        prefill_chunk: int | None = None,
        cache: KVCache | None = None,
        on_token: Callable[[int, int], None] | None = None,
        on_finish: Callable[[int, Generated], None] | None = None,
        on_step: Callable[[KVCache], None] | None = None,
        trace=None,
        **draws,
    ) -> Result:
        """Continues prompts (text, messages or token ids) until they end, or by `max_new_tokens`.

        policy: FullKV() by default. sampling: the model's own by default, or greedy; or by field,
        `temperature=0.7`. num_samples: sequences per prompt, which share its prefill. batch_size:
        sequences at once, all by default. think: what the chat template is told. positions:
        "absolute", or "compact", where keys are turned to their slots, so that text may outgrow the
        model's positions. cache: what `new_cache` gave and earlier calls filled; its sequence goes
        on with the only prompt. on_token(sequence, token), on_finish(sequence, generated) and
        on_step(cache) are called as it happens. trace: a new lens Trace, for what rounds drop.
        Ctrl-C ends the run and returns what there is. Raises UserError before it computes anything.
        """
        policy = FullKV() if policy is None else policy
        sampling = Sampling.of(sampling, draws, self.text)
        request = read_request(
            self, policy, prompts, max_new_tokens, num_samples, batch_size, prefill_chunk,
            positions, cache, system, raw, think,
        )  # fmt: skip
        roster = Roster(request, sampling.seed, self.text, ignore_eos, on_token, on_finish)
        meter = Meter(self, policy, sampling, request, trace)
        run = _Run(self, policy, sampling, request, roster, meter, on_step)
        # A resumed cache must not end half way through the layers, however often one presses.
        with held_back_interrupts(hurry=cache is None) as pressed:
            run.until_done(pressed)
        if pressed:
            roster.interrupt()
            run.leave([])
        return Result(roster.sequences, meter.close(run.replayed.seconds))

    def new_cache(self, policy: Policy, positions: str = "absolute") -> KVCache:
        """An empty cache for one sequence, with what the policy needs."""
        model, notes = self.model.config, policy.notes()
        return KVCache(model, 1, self.dtype, self.device, positions == "compact", notes)


@dataclass
class _Run:
    """One call of `generate`. Row r of the cache, and column r of `state`, is roster.live[r]'s."""

    engine: Engine
    policy: Policy
    sampling: Sampling
    request: Request
    roster: Roster
    meter: Meter
    on_step: Callable[[KVCache], None] | None
    cache: KVCache | None = None
    state: Tensor | None = None  # (3, rows) int64: the token chosen last, and its draws (`sample`)

    def __post_init__(self):
        self.replayed = Replayed(self.forward, self.engine.device)

    def until_done(self, pressed: list) -> None:
        """Runs until every sequence has ended, or `pressed` is not empty: the user wants an end."""
        while (self.roster.live or self.roster.pending) and not pressed:
            room = self.request.batch_size - len(self.roster.live)
            if self.roster.pending and room:
                self.admit(room, pressed)
            else:
                self.step()

    def admit(self, room: int, pressed: list) -> None:
        """Reads the next prompt, alone, in chunks; prunes it if that is due; joins it to the batch,
        once for each of its samples that there is room for."""
        self.meter.prefill_begins()
        ids, chunk = self.request.prompts[self.roster.next_prompt], self.request.chunk
        cache = self.request.cache or self.engine.new_cache(self.policy, self.request.positions)
        if cache.seen[0]:
            self.policy.decay(cache)  # one prefill is one update, however it is chunked
        else:
            cache.prompt = [len(ids)]
        cache.reserve(len(ids))
        for first in range(0, len(ids), chunk):
            if pressed:
                return
            tokens = torch.tensor([ids[first : first + chunk]], device=self.engine.device)  # (1, T)
            logits = self.engine.model(tokens, cache=cache, last_only=True)[:, -1]  # (1, vocab)
        self.prune(cache, prefilled=True)
        samples = self.roster.samples(room)
        if len(samples) > 1:
            cache.select([0] * len(samples))
        nothing = [0] * len(samples)
        state = to_device([nothing, self.roster.seeds(samples), nothing], self.engine.device)
        state[0] = sample(logits.expand(len(samples), -1), state[1:], self.sampling)
        if self.roster.live:
            self.cache.join(cache)
            self.state = torch.cat((self.state, state), dim=1)
        else:
            self.cache, self.state = cache, state
        self.roster.enter(samples)
        self.meter.prefill_ends()

    def step(self) -> None:
        """One token for every live sequence; those that end leave; a round where one is due."""
        cache, tokens = self.cache, self.state[0].tolist()
        most = self.engine.model.config.max_position_embeddings
        full = [cache.next_angle(row) >= most for row in range(len(tokens))]
        rows = self.roster.record(tokens, full)
        if len(rows) < len(tokens):
            self.leave(rows)
        if not rows:
            return
        self.replayed(cache, self.state)
        self.meter.step(cache)
        self.prune(cache)
        if self.on_step is not None:
            self.on_step(cache)

    def forward(self) -> None:
        """What the device does in a step: a function of tensors that stay where they are."""
        self.policy.decay(self.cache)
        logits = self.engine.model(self.state[0][:, None], cache=self.cache)[:, -1]
        self.state[0] = sample(logits, self.state[1:], self.sampling)

    def prune(self, cache: KVCache, prefilled: bool = False) -> None:
        """A round for the sequences that are due."""
        due = self.policy.due(cache, prefilled)
        if any(due):
            joins = prefilled and self.roster.live  # beside the batch
            self.meter.round_begins(cache, self.cache if joins else None)
            done = self.policy.round(cache, due)
            owners = self.roster.pending if prefilled else self.roster.live
            self.meter.round_ends(cache, due, owners, done)

    def leave(self, rows: list[int]) -> None:
        """All but these rows leave the batch, and their memory with them."""
        if self.roster.live:
            self.meter.ends(self.cache, self.roster, rows)
            if self.request.cache is None:
                index = to_device(rows, self.engine.device)
                self.cache.select(rows)
                self.state = self.state[:, index]
            self.roster.leave(rows)
