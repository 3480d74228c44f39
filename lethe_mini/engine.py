"""Generation: prefill, then token by token, with rounds of pruning in between.

The engine composes what knows nothing of each other: the model appends to a cache, a policy thins
it. A batch is many independent requests that happen to share matrix products: every prompt is
prefilled alone, then joins; a sequence that ends leaves, and its memory with it; the next prompt
takes its place. What a sequence gets never depends on its neighbours.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .cache import KVCache
from .checkpoint.load import load
from .checkpoint.text import Text
from .generation.interrupts import held_back_interrupts
from .generation.requests import check_request, encode_prompts
from .generation.roster import Roster
from .generation.sampling import check_sampling, sample
from .generation.stats import Generated, Meter, Result
from .lens.trace import Trace
from .model import Transformer
from .policy import FullKV, Policy


class Engine:
    """A model, its text, and `generate`."""

    def __init__(self, model: Transformer, text: Text | None = None, name: str = ""):
        self.model, self.text, self.name = model.eval(), text, name
        self.device = model.embed_tokens.weight.device
        self.dtype = model.embed_tokens.weight.dtype

    @classmethod
    def from_pretrained(
        cls, model: str, device="auto", dtype="auto", revision: str | None = None, compile=False
    ) -> "Engine":
        """model: a folder, a hub id, "reasoner" or "demo"; compile: decode through torch.compile,
        which takes half a minute and on a CPU a C++ compiler. Raises UserError for what cannot be
        loaded."""
        folder, transformer = load(model, device, dtype, revision)
        if compile:
            transformer.compile()
        return cls(transformer, Text(folder), model)

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[str | Sequence[int]],
        policy: Policy | None = None,
        max_new_tokens: int | Sequence[int] = 512,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        num_samples: int = 1,
        batch_size: int | None = None,
        ignore_eos: bool = False,
        system: str | None = None,
        raw: bool = False,
        positions: str = "absolute",
        prefill_chunk: int = 512,
        cache: KVCache | None = None,
        on_token: Callable[[int, int], None] | None = None,
        on_finish: Callable[[int, Generated], None] | None = None,
        on_step: Callable[[KVCache], None] | None = None,
        trace: Trace | None = None,
    ) -> Result:
        """Continues every prompt (text, or token ids) until it ends or has `max_new_tokens` more
        (one number, or one per prompt).

        policy: FullKV() by default. num_samples: sequences per prompt, which share its prefill; the
        draws of each come from `seed` and its number alone. batch_size: sequences at once, all by
        default. positions: "absolute", or "compact", where keys are turned to their slots, so that
        text may outgrow the model's positions. cache: what `new_cache` gave, and earlier calls
        filled, of one sequence that the only prompt goes on with. on_token(sequence, token),
        on_finish(sequence, generated) and on_step(cache) are called as it happens. trace: a new
        Trace, which then holds what every round dropped. Ctrl-C ends the run and returns what
        there is.
        Raises UserError for what cannot be done, before anything is computed.
        """
        policy = FullKV() if policy is None else policy
        check_sampling(temperature, top_k, top_p)
        sizes = (max_new_tokens, num_samples, batch_size, prefill_chunk)
        limits = check_request(prompts, *sizes, positions, cache, policy)
        encoded = encode_prompts(self, prompts, policy, system, raw, cache)
        counts, told = [len(ids) for ids in encoded], (on_token, on_finish)
        roster = Roster(counts, limits, num_samples, seed, self.text, ignore_eos, *told)
        meter = Meter(self, policy, seed, positions, len(roster.sequences), trace)
        if trace is not None:
            trace.begin(self, policy, encoded, num_samples, 0 if cache is None else cache.seen[0])
        # A cache that goes on must not end half way through the layers, however often one presses.
        with held_back_interrupts(hurry=cache is None) as pressed:
            run = _Run(self, policy, encoded, positions, roster, meter, pressed, cache, on_step)
            while (roster.live or roster.pending) and not pressed:
                room = (batch_size or len(roster.sequences)) - len(roster.live)
                if roster.pending and room:
                    run.admit(room, prefill_chunk)
                else:
                    run.step(temperature, top_k, top_p)
        if pressed:
            roster.interrupt()
            run.leave([])
        return Result(roster.sequences, meter.close())

    def new_cache(self, policy: Policy, positions: str = "absolute") -> KVCache:
        """An empty cache for one sequence, with what the policy needs."""
        where = self.model.config, 1, self.dtype, self.device
        return KVCache(*where, compact=positions == "compact", **policy.notes())


@dataclass
class _Run:
    """One call of `generate`. Row r of the cache and of the logits is sequence roster.live[r]."""

    engine: Engine
    policy: Policy
    prompts: list[list[int]]
    positions: str
    roster: Roster
    meter: Meter
    pressed: list  # not empty: the user wants an end
    resumed: KVCache | None
    on_step: Callable[[KVCache], None] | None
    cache: KVCache | None = None
    logits: Tensor | None = None  # (rows, vocab)

    def admit(self, room: int, chunk: int) -> None:
        """Reads the next prompt, alone, in chunks; prunes it if that is due; joins it to the batch,
        once for each of its samples that there is room for."""
        self.meter.prefill_begins()
        ids = self.prompts[self.roster.next_prompt]
        cache = self.resumed or self.engine.new_cache(self.policy, self.positions)
        if not cache.seen[0]:
            cache.prompt = [len(ids)]
        elif self.policy.gamma is not None:
            cache.decay(self.policy.gamma)  # one prefill is one update, however it is chunked
        for first in range(0, len(ids), chunk):
            if self.pressed:
                return
            tokens = torch.tensor([ids[first : first + chunk]], device=self.engine.device)
            logits = self.engine.model(tokens, cache=cache, last_only=True)[:, -1]
        self._prune(cache, prefilled=True)
        samples = self.roster.samples(room)
        if len(samples) > 1:
            cache.select([0] * len(samples))
            logits = logits.repeat(len(samples), 1)
        if self.roster.live:
            self.cache.join(cache)
            self.logits = torch.cat((self.logits, logits))
        else:
            self.cache, self.logits = cache, logits
        self.roster.enter(samples)
        self.meter.prefill_ends()

    def step(self, temperature: float, top_k: int, top_p: float) -> None:
        """One token for every live sequence; those that end leave; a round where one is due."""
        model, cache = self.engine.model, self.cache
        tokens = sample(self.logits, self.roster.draws(), temperature, top_k, top_p)
        most = model.config.max_position_embeddings
        full = [cache.next_angle(row) >= most for row in range(len(tokens))]
        rows = self.roster.record(tokens.tolist(), full)
        if len(rows) < len(tokens):
            self.leave(rows)
            tokens = tokens[rows]
        if not rows:
            return
        if self.policy.gamma is not None:
            cache.decay(self.policy.gamma)
        self.logits = model(tokens[:, None], cache=cache)[:, -1]
        self.meter.step(cache)
        self._prune(cache)
        if self.on_step is not None:
            self.on_step(cache)

    def leave(self, rows: list[int]) -> None:
        """All but these rows leave the batch, and their memory with them."""
        if self.roster.live:
            self.meter.ends(self.cache, self.roster, rows)
            if self.resumed is None:
                self.cache.select(rows)
            self.roster.leave(rows)

    def _prune(self, cache: KVCache, prefilled: bool = False) -> None:
        due = self.policy.due(cache, prefilled)
        if any(due):
            self.meter.peak(cache, *[self.cache] if prefilled and self.roster.live else [])
            owners = self.roster.pending if prefilled else self.roster.live
            with self.meter.round(cache, due, owners):
                self.policy.round(cache, due)
