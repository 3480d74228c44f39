"""This package as a measured system, and the machine itself."""

import copy
import random
import time
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.common.policies import make_policy
from benchmarks.common.words import word_ids
from benchmarks.speed.shapes import SHAPES, fill_random, shape_scores
from benchmarks.speed.system import System, check_room, on_cuda, sync
from lethe_mini import Engine
from lethe_mini.checkpoint.config import parse_config
from lethe_mini.checkpoint.demo import MEMBER, cache_root, fetch
from lethe_mini.checkpoint.load import resolve
from lethe_mini.checkpoint.text import Text
from lethe_mini.generation.capture import Replayed
from lethe_mini.generation.stats import allocated, kv_bytes, token_bytes
from lethe_mini.kernels import PREFILL_CHUNK, best_size
from lethe_mini.model import Transformer

ROUNDS = 3  # how often a round is timed, each on a copy of its own
UNLIMITED = 1 << 24  # a budget above any text


def random_model(sizes: dict, dtype: torch.dtype, device: str = "cpu") -> Transformer:
    """A model of a shape (shapes.py) whose weights are small random numbers."""
    with torch.device("meta"):
        model = Transformer(parse_config(sizes))
    model = model.to(dtype).to_empty(device=device).requires_grad_(False)
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.embed_tokens.weight
    fill_random(model.parameters())
    model.init_rope(device)
    return model.eval()


class Ours(System):
    """This package. settings: `compile`, `policy` (a name), `share` of the prompt or `budget`."""

    cache = engine = None

    def load(self) -> dict:
        settings = self.settings
        torch.set_num_threads(settings["threads"])
        if settings["shape"] is None:
            names = (settings["folder"], settings["device"], settings["dtype"])
            self.engine = Engine.from_pretrained(*names, compile=settings["compile"])
        else:
            sizes, dtype = SHAPES[settings["shape"]], getattr(torch, settings["dtype"])
            self.engine = Engine(random_model(sizes, dtype, settings["device"]))
            if settings["compile"]:
                self.engine.model.compile()
        self.policy = self._policy(None)
        weights = {p.data_ptr(): p for p in self.engine.model.parameters()}
        step = sum(p.nbytes for p in weights.values())
        if not self.engine.model.config.tie_word_embeddings:  # then a step reads one row of it
            step -= self.engine.model.embed_tokens.weight.nbytes
        return {
            "weight_bytes": step,
            "versions": {"torch": torch.__version__},
            "threads": torch.get_num_threads(),
            "dtype": str(self.engine.dtype).removeprefix("torch."),
            "device": str(self.engine.device),
            "layers": self.engine.model.config.num_hidden_layers,
            "token_bytes": token_bytes(self.engine.new_cache(self.policy)),
        }

    def _policy(self, length: int | None):
        """The policy for a prompt of so many tokens. Its budget is a number and alone decides how
        many tokens stay, so Lethe's breakpoint is off. Raises UserError for too small a budget."""
        budget, share = self.settings["budget"] or UNLIMITED, self.settings["share"]
        if share is not None and length is not None:
            # 16 tokens at least, or sinks alone would fill it; 100 % never prunes.
            budget = UNLIMITED if share >= 1 else max(16, round(share * length))
        return make_policy(
            self.settings["policy"],
            budget=budget,
            protect_prompt=False,
            breakpoint="none",
            interval=self.settings["interval"],
        )

    def configure(self, **changes) -> dict:
        """From the next `fill` on, other settings of the policy."""
        self.settings |= changes
        return {}

    def new_cache(self, prompt: int):
        positions = self.settings.get("positions", "absolute")
        cache = self.engine.new_cache(self.policy, positions)
        cache.prompt = [prompt]
        return cache

    def prefill(self, ids: list[int], batch: int) -> float:
        self.policy = policy = self._policy(len(ids))
        policy.check_prompt(len(ids))
        config = self.engine.model.config
        token = 2 * config.num_key_value_heads * config.head_dim * self.engine.dtype.itemsize
        prunes = getattr(policy, "budget", None) is not None and policy.budget < len(ids)
        kept = policy.budget + policy.interval if prunes else len(ids)
        check_room(config.num_hidden_layers * token * (len(ids) + batch * kept), self.settings)
        self.sync()
        start = time.perf_counter()
        self.cache = cache = self.new_cache(len(ids))
        chunk = best_size(PREFILL_CHUNK, self.engine.device)
        for first in range(0, len(ids), chunk):
            part = torch.tensor([ids[first : first + chunk]], device=self.engine.device)
            logits = self.engine.model(part, cache=cache, last_only=True)
        self.tokens = logits[:, -1].argmax(-1, keepdim=True)
        self.chosen = self.tokens[:, 0].tolist()
        seconds = time.perf_counter() - start
        if self.settings["shape"] is not None and policy.scored:
            shape_scores(cache)
        self.round_seconds = []
        if prunes:
            seconds += self._prune(batch)
        elif batch > 1:
            cache.select([0] * batch)
        self.tokens = self.tokens.repeat(batch, 1)
        self.replayed = Replayed(self._step, self.engine.device)
        return seconds

    def _prune(self, batch: int) -> float:
        """The round behind the prompt, then the one that comes a full interval later.

        That one takes a cache from budget + interval to budget. It is timed, since a long text
        repeats it. -> seconds of the first."""
        policy, start = self.policy, time.perf_counter()
        wide = replace(policy, budget=policy.budget + policy.interval)
        if any(wide.due(self.cache, True)):
            wide.round(self.cache, [True])
        self.sync()
        seconds = time.perf_counter() - start
        one = self.cache
        for _ in range(ROUNDS):
            self.cache = None  # frees it before the next copy is made
            cache = copy.deepcopy(one)
            if batch > 1:
                cache.select([0] * batch)
            self.sync()
            start = time.perf_counter()
            policy.round(cache, [True] * batch)
            self.sync()
            self.round_seconds.append(time.perf_counter() - start)
            self.cache = cache
        return seconds

    def _step(self) -> None:
        """As the engine's."""
        self.policy.decay(self.cache)
        logits = self.engine.model(self.tokens, cache=self.cache)[:, -1]
        self.tokens.copy_(logits.argmax(-1, keepdim=True))

    def forward(self) -> list[int]:
        self.replayed(self.cache, self.tokens)
        return self.tokens[:, 0].tolist()

    def decode(self, count: int) -> dict:
        """So many tokens as in a real run, with rounds where they are due. Seconds of each step
        without its round, and of each round."""
        steps, rounds = [], []
        for _ in range(count):
            self.sync()
            start = time.perf_counter()
            self.forward()
            self.sync()
            steps.append(time.perf_counter() - start)
            start = time.perf_counter()
            due = self.policy.due(self.cache)
            if any(due):
                self.policy.round(self.cache, due)
                self.sync()
            rounds.append(time.perf_counter() - start)
        kept = [seconds for seconds in rounds if seconds > 1e-3]  # where less, none was due
        return {
            "step_seconds": steps,
            "round_seconds": kept,
            "rounds_total": sum(rounds),
            **self.state(),
        }

    def snapshot(self) -> dict:
        """Puts the cache aside as it is now; `swap` takes it up again."""
        self.aside = copy.deepcopy(self.cache), self.tokens.clone()
        return {}

    def swap(self) -> dict:
        now, (self.cache, self.tokens) = (self.cache, self.tokens), self.aside
        self.aside = now
        return {}

    def held(self) -> dict:
        cache = self.cache
        return {
            "kv_bytes": kv_bytes(cache),
            "kv_allocated": allocated(cache),
            "tokens": cache.held / len(cache.layers) / len(cache.seen),
            "seen": cache.seen[0],
            "round_seconds": getattr(self, "round_seconds", []),
        }


class Machine:
    """No model: how fast the machine reads memory, and the prompts for the others."""

    def __init__(self, settings: dict):
        self.settings = settings

    def load(self) -> dict:
        torch.set_num_threads(self.settings["threads"])
        device = self.settings["device"]
        if device == "cuda" and not torch.cuda.is_available():
            raise RuntimeError("this PyTorch sees no CUDA device")
        # More than the processor's caches hold, which on a shared machine may be hundreds of MB.
        self.block = torch.ones(self.settings["bandwidth_bytes"] // 4, device=device)
        facts = {"versions": {"torch": torch.__version__}, "threads": torch.get_num_threads()}
        if on_cuda(self.settings):
            facts["gpu"] = torch.cuda.get_device_name()
            facts["gpu_memory"] = torch.cuda.get_device_properties(0).total_memory
        return facts

    def bandwidth(self, repetitions: int = 2) -> dict:
        """Bytes per second: the quickest of a few reductions over the block."""
        block, best, name = self.block, 0.0, ""
        kinds = {
            "sum": block.sum,
            "amax": block.amax,
            "dot": lambda: torch.dot(block, block),
            "sum of int32": lambda: block.view(torch.int32).sum(),
        }
        for kind, reduce in kinds.items():
            for _ in range(repetitions):
                sync(self.settings)
                start = time.perf_counter()
                reduce()
                sync(self.settings)
                rate = block.nbytes / (time.perf_counter() - start)
                best, name = max((best, name), (rate, kind))
        return {"bytes_per_second": best, "reduction": name}

    def folder(self, model: str) -> dict:
        """The checkpoint's folder. Fetches the checkpoint where it is not there yet."""
        return {"folder": str(resolve(model))}

    def gguf(self) -> dict:
        """The demo's GGUF, kept in the user's cache."""
        path = cache_root() / "benchmarks" / Path(MEMBER).name
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            fetch(path.parent).replace(path)
        return {"path": str(path)}

    def prompt(self, folder: str | None, shape: str | None, tokens: int) -> dict:
        """Ids of words in random order, the same for all systems; random ids for a shape."""
        if folder is not None:
            return {"ids": word_ids(Text(Path(folder)), tokens)}
        rng, size = random.Random(0), SHAPES[shape]["vocab_size"]
        return {"ids": [rng.randrange(size) for _ in range(tokens)]}
