"""Generation: prefill, then token by token, with rounds of pruning in between.

The engine composes what knows nothing of each other: the model appends to a cache, a policy thins
it. A batch is many independent requests that happen to share matrix products: every prompt is
prefilled alone, then joins; a sequence that ends leaves, and its memory with it; the next prompt
takes its place. What a sequence gets never depends on its neighbours.
"""

import random
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from itertools import islice

import torch
from torch import Tensor

from .cache import KVCache
from .errors import UserError
from .loader import check_dtype, load_model, pick_device, pick_dtype, resolve
from .model import Transformer
from .policy import FullKV, Policy
from .prompts import check_sizes, encode_prompts
from .sampling import check_sampling, sample
from .signals import held_back_interrupts
from .stats import Generated, Meter, Result
from .text import Text
from .trace import Trace

POSITIONS = ("absolute", "compact")


class Engine:
    """A model, its text, and `generate`."""

    def __init__(self, model: Transformer, text: Text | None = None, name: str = ""):
        self.model, self.text, self.name = model.eval(), text, name
        self.device = model.embed_tokens.weight.device
        self.dtype = model.embed_tokens.weight.dtype

    @classmethod
    def from_pretrained(
        cls,
        model: str,
        device: str = "auto",
        dtype: str = "auto",
        revision: str | None = None,
        compile: bool = False,
    ) -> "Engine":
        """model: a folder, a hub id, "reasoner" or "demo"; compile: decode through torch.compile,
        which takes half a minute and on a CPU a C++ compiler. Raises UserError for what cannot be
        loaded."""
        device = pick_device(device)
        check_dtype(dtype)
        folder = resolve(model, revision)
        weights = load_model(folder, device, pick_dtype(dtype, device, folder))
        engine = cls(weights, Text(folder), model)
        if compile:
            engine.model.compile()
        return engine

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
        if positions not in POSITIONS:
            raise UserError(f"positions should be {' or '.join(POSITIONS)}, not {positions!r}")
        if cache is not None and len(prompts) * num_samples != 1:
            raise UserError("a cache is gone on with by one prompt and one sample")
        encoded = encode_prompts(self, prompts, policy, system, raw, cache)
        limits = check_sizes(prompts, max_new_tokens, num_samples, batch_size, prefill_chunk)
        batch_size = batch_size or max(1, len(prompts) * num_samples)
        if trace is not None:
            trace.begin(self, policy, encoded, num_samples, 0 if cache is None else cache.seen[0])
        run = _Run(self, policy, encoded, limits, seed, num_samples, positions)
        run.resumed, run.on_step, run.trace = cache, on_step, trace
        run.eos = frozenset() if ignore_eos or self.text is None else self.text.eos_ids
        run.on_token, run.on_finish = on_token, on_finish
        with held_back_interrupts() as run.pressed:
            try:
                while (run.live or run.pending) and not run.pressed:
                    if run.pending and len(run.live) < batch_size:
                        run.admit(batch_size - len(run.live), prefill_chunk)
                    else:
                        run.step(temperature, top_k, top_p)
            except KeyboardInterrupt:  # from a callback
                run.pressed.append(True)
            if run.pressed:
                run.interrupt()
        return Result(run.sequences, run.meter.close())

    def new_cache(self, policy: Policy, positions: str = "absolute") -> KVCache:
        """An empty cache for one sequence, with what the policy needs."""
        return KVCache(
            self.model.config,
            dtype=self.dtype,
            device=self.device,
            scored=policy.gamma is not None,
            window=policy.window,
            compact=self.model.inv_freq if positions == "compact" else None,
        )


class _Run:
    """One call of `generate`. Row r of the cache and of the logits is sequence live[r]."""

    eos: frozenset[int] = frozenset()
    on_token = on_finish = on_step = resumed = None

    def __init__(self, engine, policy, encoded, limits, seed, num_samples, positions):
        self.engine, self.model, self.policy = engine, engine.model, policy
        self.encoded, self.limits, self.num_samples = encoded, limits, num_samples
        self.positions = positions
        self.sequences = [Generated(len(ids)) for ids in encoded for _ in range(num_samples)]
        self.seed, self.draws = seed, {}  # sequence -> its random numbers, while it lives
        self.pending = deque(range(len(self.sequences)))
        self.live: list[int] = []
        self.cache: KVCache | None = None
        self.logits: Tensor | None = None  # (rows, vocab)
        self.meter = Meter(engine, policy, seed, positions, len(self.sequences))

    def admit(self, room: int, chunk: int) -> None:
        """Reads the next prompt, alone, in chunks; prunes it if that is due; joins it to the batch,
        once for each of its samples that there is room for."""
        self.meter.prefill_begins()
        prompt = self.pending[0] // self.num_samples
        ids = self.encoded[prompt]
        cache = self.resumed or self.engine.new_cache(self.policy, self.positions)
        if not cache.seen[0]:
            cache.prompt = [len(ids)]
        elif self.policy.gamma is not None:
            cache.decay(self.policy.gamma)  # one prefill is one update, however it is chunked
        for first in range(0, len(ids), chunk):
            if self.pressed:
                return
            tokens = torch.tensor([ids[first : first + chunk]], device=self.engine.device)
            logits = self.model(tokens, cache=cache, last_only=True)[:, -1]
        self._prune(cache, prefilled=True)
        samples = [i for i in islice(self.pending, room) if i // self.num_samples == prompt]
        for index in samples:
            self.pending.popleft()
            self.draws[index] = random.Random(f"{self.seed}-{index % self.num_samples}")
        if len(samples) > 1:
            cache.select([0] * len(samples))
            logits = logits.repeat(len(samples), 1)
        if self.live:
            self.cache.join(cache)
            self.logits = torch.cat((self.logits, logits))
        else:
            self.cache, self.logits = cache, logits
        self.live += samples
        self.meter.prefill_ends()

    def step(self, temperature: float, top_k: int, top_p: float) -> None:
        """One token for every live sequence; those that end leave; a round where one is due."""
        draws = [self.draws[index].random() for index in self.live]
        tokens = sample(self.logits, draws, temperature, top_k, top_p)
        for row, token in enumerate(tokens.tolist()):
            index = self.live[row]
            one = self.sequences[index]
            one.token_ids.append(token)
            if token in self.eos:
                one.finish_reason = "stop"
            elif len(one.token_ids) >= self.limits[index // self.num_samples]:
                one.finish_reason = "length"
            elif self.cache.next_angle(row) >= self.model.config.max_position_embeddings:
                one.finish_reason = "positions"
            if self.on_token is not None:
                self.on_token(index, token)
        rows = [row for row, i in enumerate(self.live) if self.sequences[i].finish_reason is None]
        if len(rows) < len(self.live):
            self._leave(rows)
            tokens = tokens[rows]
        if not self.live:
            return
        if self.policy.gamma is not None:
            self.cache.decay(self.policy.gamma)
        self.logits = self.model(tokens[:, None], cache=self.cache)[:, -1]
        self.meter.step(self.cache)
        self._prune(self.cache)
        if self.on_step is not None:
            self.on_step(self.cache)

    def _leave(self, rows: list[int]) -> None:
        """All but these rows leave the batch, and their memory with them."""
        self.meter.peak(self.cache)
        gone = [index for row, index in enumerate(self.live) if row not in rows]
        for index in gone:
            one = self.sequences[index]
            one.generated_tokens = len(one.token_ids)
            one.text = "" if self.engine.text is None else self.engine.text.decode(one.token_ids)
            self.meter.final(self.cache, self.live.index(index), index)
            if self.trace is not None:
                self.trace.ends(index, self.cache.seen[self.live.index(index)], one)
            del self.draws[index]
        self.live = [self.live[row] for row in rows]
        if self.resumed is None:
            self.cache.select(rows)
        for index in gone:
            if self.on_finish is not None:
                self.on_finish(index, self.sequences[index])

    def _prune(self, cache: KVCache, prefilled: bool = False) -> None:
        due = self.policy.due(cache, prefilled)
        if any(due):
            waiting = [self.cache] if self.live and cache is not self.cache else []
            self.meter.peak(cache, *waiting)
            owners = self.pending if prefilled else self.live
            recorder = self.trace and self.trace.round(self.policy, cache, due, owners)
            with recorder or nullcontext(), self.meter.round(cache, due):
                self.policy.round(cache, due)

    def interrupt(self) -> None:
        """Ends what is live, and what never began, with what there is."""
        self.on_finish = None
        for one in self.sequences:
            one.finish_reason = one.finish_reason or "interrupted"
        if self.live:
            self._leave([])
