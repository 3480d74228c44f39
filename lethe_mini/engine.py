"""Generation: prefill, then token by token, with rounds of pruning in between.

The engine composes what knows nothing of each other: the model appends to a cache, a policy thins
it. A batch is many independent requests that happen to share matrix products: every prompt is
prefilled alone, then joins; a sequence that ends leaves, and its memory with it. What a sequence
gets never depends on its neighbours.
"""

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor

from .cache import KVCache
from .config import ModelConfig
from .errors import UserError
from .loader import load_model, resolve
from .model import Transformer
from .policy import FullKV, Policy
from .text import Text

POSITIONS = ("absolute", "compact")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class Generated:
    """One sequence of a result. finish_reason: "stop" (end of text), "length" (as many tokens as
    asked for), "positions" (the model has no more), "interrupted"."""

    prompt_tokens: int
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None

    @property
    def generated_tokens(self) -> int:
        return len(self.token_ids)


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
    prune_seconds: float = 0.0  # part of the above
    kv_bytes_peak: int = 0
    kv_bytes_final: int = 0  # at the end of each sequence, added up
    kv_bytes_full: int = 0  # what a full cache would hold there
    kv_reduction: float = 0.0  # 1 - final / full
    kv_allocated_peak: int = 0  # all tensors of the cache, spare room and bookkeeping included
    kv_tokens_mean: float = 0.0  # over steps, layers and sequences
    kv_tokens_final: list[list[int]] = field(default_factory=list)
    rounds: int = 0
    evicted_tokens: int = 0  # over layers and sequences


@dataclass
class Result:
    sequences: list[Generated]
    stats: Stats

    def to_dict(self) -> dict:
        """What `--stats` writes: the statistics, and the sequences with their text."""
        sequences = [
            {**asdict(one), "generated_tokens": one.generated_tokens} for one in self.sequences
        ]
        return {**asdict(self.stats), "sequences": sequences}


def sample(logits: Tensor, draws: list[float], temperature: float, top_k: int, top_p: float):
    """(B, vocab) float32 and a uniform draw in [0, 1) per sequence -> (B,) tokens.

    Greedy at temperature 0. Else the draw runs up the cumulated probabilities, so that a sequence's
    token depends on its own logits and its own draw alone.
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    probs, tokens = (logits / temperature).softmax(dim=-1), None
    if top_k or top_p < 1:
        probs, tokens = probs.sort(dim=-1, descending=True, stable=True)
        if top_k:
            probs[:, top_k:] = 0
        before = probs.cumsum(dim=-1) - probs
        probs = probs.masked_fill(before >= top_p * probs.sum(-1, keepdim=True), 0)
    cumulated = probs.cumsum(dim=-1)
    target = torch.tensor(draws, device=logits.device)[:, None] * cumulated[:, -1:]
    # The first token whose cumulated probability is above the target has a probability itself.
    pick = (cumulated <= target).sum(dim=-1, keepdim=True).clamp(max=probs.shape[-1] - 1)
    return (pick if tokens is None else tokens.gather(-1, pick))[:, 0]


def pick_device(name: str) -> str:
    """ "auto" is CUDA, else Apple's MPS, else the CPU. Raises UserError for what is not there."""
    have = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        return next((device for device, there in have.items() if there), "cpu")
    kind = name.partition(":")[0]
    if kind not in ("cpu", *have):
        raise UserError(f"device should be auto, cpu, cuda or mps, not {name!r}")
    if not have.get(kind, True):
        raise UserError(f"this machine has no {kind} device; use --device cpu or auto")
    return name


def check_sampling(temperature: float, top_k: int, top_p: float) -> None:
    """Raises UserError for values no distribution has."""
    if not 0 <= temperature < float("inf"):
        raise UserError(f"temperature should be 0 (greedy) or above, not {temperature}")
    if not 0 < top_p <= 1:
        raise UserError(f"top-p should be above 0 and at most 1, not {top_p}")
    if top_k < 0:
        raise UserError(f"top-k should be 0 (off) or above, not {top_k}")


class Engine:
    """A model, its text, and `generate`."""

    def __init__(self, model: Transformer, text: Text | None = None, name: str = ""):
        self.model, self.text, self.name = model.eval(), text, name
        self.device = model.embed_tokens.weight.device
        self.dtype = model.embed_tokens.weight.dtype

    @classmethod
    def from_pretrained(
        cls, model: str, device: str = "auto", dtype: str = "auto", revision: str | None = None
    ) -> "Engine":
        """model: a folder, a hub id or "demo". Raises UserError for what cannot be loaded."""
        device = pick_device(device)
        if dtype not in ("auto", *DTYPES):
            raise UserError(f"dtype should be auto, {', '.join(DTYPES)}, not {dtype!r}")
        folder = resolve(model, revision)
        if dtype == "auto":
            dtype = ModelConfig.from_folder(folder).dtype
            if device == "cpu" and dtype == "float16":  # slow there, and narrow
                dtype = "float32"
        return cls(load_model(folder, device, DTYPES[dtype]), Text(folder), model)

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[str | Sequence[int]],
        policy: Policy | None = None,
        max_new_tokens: int = 512,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        ignore_eos: bool = False,
        system: str | None = None,
        raw: bool = False,
        positions: str = "absolute",
        prefill_chunk: int = 512,
        on_token: Callable[[int, int], None] | None = None,
    ) -> Result:
        """Continues every prompt (text, or token ids) until it ends or has `max_new_tokens` more.

        policy: FullKV() by default. positions: "absolute", or "compact", where keys are turned to
        their slots, so that text may outgrow the model's positions. on_token(sequence, token) is
        called for each token as it is made. Ctrl-C ends the run and returns what there is.
        Raises UserError for what cannot be done, before anything is computed.
        """
        policy = FullKV() if policy is None else policy
        check_sampling(temperature, top_k, top_p)
        if min(max_new_tokens, prefill_chunk) < 1:
            raise UserError("max-new-tokens and prefill-chunk should be at least 1")
        if positions not in POSITIONS:
            raise UserError(f"positions should be {' or '.join(POSITIONS)}, not {positions!r}")
        encoded = [self._encode(prompt, system, raw, policy) for prompt in prompts]
        eos = frozenset() if ignore_eos or self.text is None else self.text.eos_ids

        run = _Run(self, policy, encoded, seed, positions, prefill_chunk)
        try:
            for index in range(len(encoded)):
                run.prefill(index)
            while run.live:
                tokens = run.sample(temperature, top_k, top_p)
                for row, token in enumerate(tokens.tolist()):
                    one = run.sequences[run.live[row]]
                    one.token_ids.append(token)
                    if token in eos:
                        one.finish_reason = "stop"
                    elif len(one.token_ids) >= max_new_tokens:
                        one.finish_reason = "length"
                    elif run.out_of_positions(row):
                        one.finish_reason = "positions"
                    if on_token is not None:
                        on_token(run.live[row], token)
                tokens = run.leave(tokens)
                if run.live:
                    run.step(tokens)
        except KeyboardInterrupt:
            run.interrupt()
        return run.result()

    def _encode(self, prompt, system: str | None, raw: bool, policy: Policy) -> list[int]:
        """A prompt's token ids; UserError if the model or the policy cannot take it."""
        if isinstance(prompt, str):
            if self.text is None:
                raise UserError("this engine has no tokenizer; give token ids")
            prompt = self.text.encode_prompt(prompt, system, raw) if prompt.strip() else []
        ids, config = list(prompt), self.model.config
        if not ids:
            raise UserError("the prompt is empty; give it some text")
        if not 0 <= min(ids) <= max(ids) < config.vocab_size:
            raise UserError(f"a prompt's token ids should be from 0 to {config.vocab_size - 1}")
        limit = config.max_position_embeddings
        if len(ids) > limit:
            raise UserError(f"the prompt has {len(ids)} tokens and the model takes {limit}; cut it")
        policy.check(len(ids))
        return ids


class _Run:
    """One call of `generate`: the live sequences, their cache, and what is counted.

    Row r of the cache and of the logits is sequence live[r].
    """

    def __init__(self, engine, policy, encoded, seed, positions, prefill_chunk):
        self.engine, self.policy, self.encoded, self.chunk = engine, policy, encoded, prefill_chunk
        self.compact = positions == "compact"
        self.sequences = [Generated(len(ids)) for ids in encoded]
        self.draws = [random.Random(f"{seed}-{index}") for index in range(len(encoded))]
        self.live: list[int] = []
        self.cache: KVCache | None = None
        self.logits: Tensor | None = None  # (rows, vocab)
        self.decode_started: float | None = None
        self.steps = self.held_sum = self.held_count = 0
        facts = {"name": policy.name, **asdict(policy)}
        device, dtype = str(engine.device), str(engine.dtype).removeprefix("torch.")
        self.stats = Stats(engine.name, facts, device, dtype, seed, positions)
        self.stats.kv_tokens_final = [[] for _ in encoded]

    def prefill(self, index: int) -> None:
        """Reads a prompt alone, in chunks, prunes it if that is due, and joins it to the batch."""
        start = time.perf_counter()
        ids, policy, model = self.encoded[index], self.policy, self.engine.model
        cache = KVCache(
            model.config,
            dtype=self.engine.dtype,
            device=self.engine.device,
            scored=policy.gamma is not None,
            window=policy.window,
            compact=model.inv_freq if self.compact else None,
        )
        cache.prompt = [len(ids)]
        for first in range(0, len(ids), self.chunk):
            chunk = torch.tensor([ids[first : first + self.chunk]], device=self.engine.device)
            logits = model(chunk, cache=cache, last_only=True)[:, -1]
        self._prune(cache)
        self.live.append(index)
        if self.cache is None:
            self.cache, self.logits = cache, logits
        else:
            self.cache.join(cache)
            self.logits = torch.cat((self.logits, logits))
        self.stats.prefill_seconds += time.perf_counter() - start

    def sample(self, temperature: float, top_k: int, top_p: float) -> Tensor:
        """The next token of every live sequence, (rows,)."""
        self.decode_started = self.decode_started or time.perf_counter()
        draws = [self.draws[index].random() for index in self.live]
        return sample(self.logits, draws, temperature, top_k, top_p)

    def out_of_positions(self, row: int) -> bool:
        """Is there no RoPE position left for a further token? In compact mode those are slots."""
        limit = self.engine.model.config.max_position_embeddings
        if not self.compact or self.cache.seen[row] < limit:
            return self.cache.seen[row] >= limit
        return max(layer.lengths[row] for layer in self.cache.layers) >= limit

    def leave(self, tokens: Tensor) -> Tensor:
        """Lets the finished sequences go, and their memory with them."""
        rows = [row for row, i in enumerate(self.live) if self.sequences[i].finish_reason is None]
        if len(rows) == len(self.live):
            return tokens
        self._count_peak(self.cache)
        for row, index in enumerate(self.live):
            if row not in rows:
                self._count_final(row, index)
        self.live = [self.live[row] for row in rows]
        self.cache.select(rows)
        return tokens[rows]

    def step(self, tokens: Tensor) -> None:
        """One token more for every live sequence, then a round where one is due."""
        if self.policy.gamma is not None:
            self.cache.decay(self.policy.gamma)
        self.logits = self.engine.model(tokens[:, None], cache=self.cache)[:, -1]
        self.steps += len(self.live)
        self.held_sum += self.cache.held
        self.held_count += len(self.live) * len(self.cache.layers)
        self._prune(self.cache)

    def _prune(self, cache: KVCache) -> None:
        due = self.policy.due(cache)
        if not any(due):
            return
        self._count_peak(cache)
        start, before = time.perf_counter(), cache.held
        self.policy.round(cache, due)
        self.stats.rounds += sum(due)
        self.stats.evicted_tokens += before - cache.held
        self.stats.prune_seconds += time.perf_counter() - start

    def _count_peak(self, cache: KVCache) -> None:
        # Memory only grows between two rounds or departures, so looking there is enough.
        stats = self.stats
        stats.kv_bytes_peak = max(stats.kv_bytes_peak, cache.held * cache.token_bytes)
        stats.kv_allocated_peak = max(stats.kv_allocated_peak, cache.allocated)

    def _count_final(self, row: int, index: int) -> None:
        final = [layer.lengths[row] for layer in self.cache.layers]
        self.stats.kv_tokens_final[index] = final
        self.stats.kv_bytes_final += sum(final) * self.cache.token_bytes
        self.stats.kv_bytes_full += self.cache.seen[row] * len(final) * self.cache.token_bytes

    def interrupt(self) -> None:
        """Ends what is live, and what has not begun, with what there is."""
        for one in self.sequences:
            one.finish_reason = one.finish_reason or "interrupted"
        if self.live:
            self._count_peak(self.cache)
            for row, index in enumerate(self.live):
                self._count_final(row, index)

    def result(self) -> Result:
        stats = self.stats
        if self.decode_started is not None:
            stats.decode_seconds = time.perf_counter() - self.decode_started
        stats.decode_tokens_per_second = self.steps / max(stats.decode_seconds, 1e-9)
        stats.kv_reduction = 1 - stats.kv_bytes_final / max(1, stats.kv_bytes_full)
        stats.kv_tokens_mean = self.held_sum / max(1, self.held_count)
        for one in self.sequences:
            one.text = "" if self.engine.text is None else self.engine.text.decode(one.token_ids)
        return Result(self.sequences, stats)
