"""One system under test, in a process of its own, driven by decode.py through a pipe.

    python -m benchmarks.speed.decode_worker SYSTEM

Reads one JSON request a line from standard input and answers each with one line of JSON; between
two requests it waits for input and so uses no processor. Systems: `ours`, `transformers`,
`kvpress`, `llama.cpp`, and `machine`, which has no model: it measures the read bandwidth and makes
prompts. Only the standard library is imported at the top, for each system brings its own
interpreter, which may have neither torch nor this package.

What every system with a model does:

- `load`  -> what is loaded: versions, threads, bytes of weights a step reads, bytes of a token
- `fill`  -> reads a prompt, forks it to a batch; seconds to the first token
- `steps` -> decodes that many tokens for every sequence, greedily; seconds of each
- `drop`  -> frees the cache
"""

import contextlib
import copy
import ctypes
import gc
import inspect
import json
import os
import re
import signal
import statistics
import sys
import time
from dataclasses import fields, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PREFILL_CHUNK = 512  # tokens; what Engine.generate does by default
ROUNDS = 3  # how often a round is timed, each on a fork of its own
GB = 1e9

# Published geometries, as in each model's config.json; 2024 to 2025, from the hub.
LLAMA3 = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
}
QWEN2 = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
}


def _sizes(base, hidden, inner, layers, heads, kv_heads, tied, **more) -> dict:
    return {
        **base,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "tie_word_embeddings": tied,
        **more,
    }


SHAPES = {
    "smollm2-135m": _sizes(
        LLAMA3, 576, 1536, 30, 9, 3, True, vocab_size=49152, rope_theta=100000.0
    ),
    "llama-1b": _sizes(LLAMA3, 2048, 8192, 16, 32, 8, True),  # Llama 3.2 1B
    "llama-3b": _sizes(LLAMA3, 3072, 8192, 28, 24, 8, True),  # Llama 3.2 3B
    "llama-8b": _sizes(LLAMA3, 4096, 14336, 32, 32, 8, False),  # Llama 3.1 8B, R1-Distill-Llama-8B
    "qwen-0.5b": _sizes(QWEN2, 896, 4864, 24, 14, 2, True, vocab_size=151936),  # Qwen2.5 0.5B
    "qwen-1.5b": _sizes(QWEN2, 1536, 8960, 28, 12, 2, True, vocab_size=151936),
    "qwen-7b": _sizes(QWEN2, 3584, 18944, 28, 28, 4, False, vocab_size=152064),
}


class OutOfMemoryError(Exception):
    """What was asked for does not fit; says how much of how much."""


# -- memory ----------------------------------------------------------------------------------------


def _status(key: str) -> int:
    """Bytes, from /proc/self/status; 0 where there is none."""
    try:
        found = re.search(key + r":\s+(\d+)", Path("/proc/self/status").read_text())
    except OSError:
        return 0
    return int(found.group(1)) * 1024 if found else 0


def _on_cuda(settings: dict) -> bool:
    return str(settings.get("device", "cpu")).startswith("cuda")


def reset_peak(settings: dict) -> None:
    """From here on the peak counts anew. On Linux the kernel lets a process reset its own."""
    gc.collect()
    if _on_cuda(settings):
        import torch

        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return
    with contextlib.suppress(OSError, AttributeError):  # what is free goes back first (glibc)
        ctypes.CDLL(None).malloc_trim(0)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def memory_peak(settings: dict) -> int:
    """Bytes: the most since `reset_peak`. The process' resident size, or CUDA's allocator."""
    if _on_cuda(settings):
        import torch

        return torch.cuda.max_memory_allocated()
    return _status("VmHWM")


def resident(settings: dict) -> int:
    """Bytes that the process has now: resident size, or CUDA's allocator."""
    if _on_cuda(settings):
        import torch

        return torch.cuda.memory_allocated()
    return _status("VmRSS")


def available() -> int:
    """Bytes that the machine could still give to processes; 0 where the system does not say."""
    try:
        found = re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())
    except OSError:
        return 0
    return int(found.group(1)) * 1024 if found else 0


def check_room(need: float, settings: dict) -> None:
    """Raises OutOfMemoryError before the system's own killer would end the process (or another)."""
    free = available()
    if not _on_cuda(settings) and free and need > free:
        raise OutOfMemoryError(f"needs {need / GB:.1f} GB of {free / GB:.1f} GB")


# -- random weights of a published geometry --------------------------------------------------------


def fill_random(parameters, seed: int = 0) -> None:
    """Small random numbers, tiled from one draw: billions of draws would take minutes."""
    import torch

    torch.manual_seed(seed)
    draw = torch.randn(1 << 20)
    for parameter in parameters:
        if parameter.dim() == 1:
            parameter.fill_(1.0)
            continue
        flat = parameter.view(-1)
        tile = (draw * parameter.shape[-1] ** -0.5).to(parameter.device, parameter.dtype)
        for first in range(0, len(flat), len(tile)):
            part = flat[first : first + len(tile)]
            part.copy_(tile[: len(part)])


def shape_scores(cache, seed: int = 0) -> None:
    """Scores as a trained model has them, in place: a few sinks with a large share of the mass, the
    newest tokens next, a long decaying tail; the deeper the layer, the more concentrated."""
    import torch

    draw = torch.Generator().manual_seed(seed)
    for index, layer in enumerate(cache.layers):
        scores = layer.scores  # (B, H_kv, S)
        B, H_kv, S = scores.shape
        age = torch.arange(S, 0, -1).float()
        noise = torch.randn(B, H_kv, S, generator=draw)
        steep = 0.4 + 0.4 * index / max(1, len(cache.layers) - 1)
        shaped = age.pow(-steep) * noise.exp()
        shaped[..., :4] += shaped.sum(-1, keepdim=True) * torch.tensor([0.6, 0.2, 0.1, 0.1])[:S]
        scores.copy_(shaped.to(scores.device))


# -- systems ---------------------------------------------------------------------------------------


class System:
    """What all systems with a model share: greedy decoding, timed step by step.

    A system defines `load`, `prefill`, `forward` and `held`.
    """

    def __init__(self, settings: dict):
        self.settings = settings
        self.tokens = None  # (B,) the last tokens, not read yet
        self.chosen: list[int] = []  # what the first sequence got since `fill`

    def load(self) -> dict:
        raise NotImplementedError

    def prefill(self, ids: list[int], batch: int) -> float:
        """Reads the prompt and forks it; leaves the first tokens. -> seconds to the first token."""
        raise NotImplementedError

    def forward(self) -> list[int]:
        """One step for all sequences; leaves the next tokens and gives them to the host."""
        raise NotImplementedError

    def held(self) -> dict:
        """kv_bytes: keys and values of the tokens held; kv_allocated; tokens: a layer's mean."""
        raise NotImplementedError

    def sync(self) -> None:
        if _on_cuda(self.settings):
            import torch

            torch.cuda.synchronize()

    def fill(self, ids: list[int], batch: int) -> dict:
        self.drop()
        reset_peak(self.settings)
        self.chosen = []
        seconds = self.prefill(ids, batch)
        return {"seconds": seconds, **self.state()}

    def steps(self, count: int, warm: int = 1) -> dict:
        """`warm` steps that are not timed (the caches of the processor hold another system's
        weights), then `count` that are."""
        seconds = []
        for step in range(warm + count):
            self.sync()
            start = time.perf_counter()
            row = self.forward()
            self.sync()
            if step >= warm:
                seconds.append(time.perf_counter() - start)
            self.chosen.append(row[0])
        return {"step_seconds": seconds, **self.state()}

    def state(self) -> dict:
        return {"peak": memory_peak(self.settings), "chosen": self.chosen, **self.held()}

    def drop(self) -> dict:
        self.tokens = self.cache = None
        gc.collect()
        return {}


class Ours(System):
    """This package. settings: `compile`, `policy` (a name), `share` of the cache or None."""

    cache = engine = None

    def load(self) -> dict:
        import torch

        sys.path.insert(0, str(ROOT))
        from lethe_mini import Engine
        from lethe_mini.generation.stats import token_bytes

        settings = self.settings
        torch.set_num_threads(settings["threads"])
        if settings["shape"] is None:
            names = (settings["folder"], settings["device"], settings["dtype"])
            self.engine = Engine.from_pretrained(*names, compile=settings["compile"])
        else:
            self.engine = Engine(self._random_model(getattr(torch, settings["dtype"])))
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

    def _random_model(self, dtype):
        import torch

        from lethe_mini.checkpoint.config import parse_config
        from lethe_mini.model import Transformer

        with torch.device("meta"):
            model = Transformer(parse_config(SHAPES[self.settings["shape"]]))
        model = model.to(dtype).to_empty(device=self.settings["device"]).requires_grad_(False)
        if model.config.tie_word_embeddings:
            model.lm_head.weight = model.embed_tokens.weight
        fill_random(model.parameters())
        model.init_rope(self.settings["device"])
        return model.eval()

    def _policy(self, length: int | None):
        """The policy for a cell of so many tokens; its budget alone decides what stays, so
        Algorithm 1's breakpoint is off. Raises UserError where the budget is too small."""
        from lethe_mini.policies import POLICIES

        kind, share = POLICIES[self.settings["policy"]], self.settings["share"]
        known = {spec.name for spec in fields(kind)}
        if "budget" not in known:
            return kind()
        budget = self.settings["budget"]
        if share is not None and length is not None:
            # 100 %: never prunes. Below it some tokens always stay, or sinks alone would fill it.
            budget = 1 << 24 if share >= 1 else max(16, round(share * length))
        options = {"budget": budget or 1 << 24, "protect_prompt": False, "knee": "none"}
        options["interval"] = self.settings["interval"]
        return kind(**{key: value for key, value in options.items() if key in known})

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
        import torch

        self.policy = policy = self._policy(len(ids))
        policy.check(len(ids))
        config = self.engine.model.config
        token = 2 * config.num_key_value_heads * config.head_dim * self.engine.dtype.itemsize
        prunes = getattr(policy, "budget", None) is not None and policy.budget < len(ids)
        kept = policy.budget + policy.interval if prunes else len(ids)
        check_room(config.num_hidden_layers * token * (len(ids) + batch * kept), self.settings)
        self.sync()
        start = time.perf_counter()
        self.cache = cache = self.new_cache(len(ids))
        for first in range(0, len(ids), PREFILL_CHUNK):
            part = torch.tensor([ids[first : first + PREFILL_CHUNK]], device=self.engine.device)
            logits = self.engine.model(part, cache=cache, last_only=True)
        self.tokens = logits[:, -1].argmax(-1)
        self.chosen = self.tokens.tolist()
        seconds = time.perf_counter() - start
        if self.settings["shape"] is not None and policy.gamma is not None:
            shape_scores(cache)
        self.round_seconds = []
        if prunes:
            seconds += self._prune(batch)
        elif batch > 1:
            cache.select([0] * batch)
        self.tokens = self.tokens.repeat(batch)
        return seconds

    def _prune(self, batch: int) -> float:
        """The round after the prefill, then the one that a full interval later falls due, which
        takes a cache from budget + interval to budget: timed, for it comes again and again."""
        policy, start = self.policy, time.perf_counter()
        wide = replace(policy, budget=policy.budget + policy.interval)
        if any(wide.due(self.cache, True)):
            wide.round(self.cache, [True])
        self.sync()
        seconds = time.perf_counter() - start
        one = self.cache
        for _ in range(ROUNDS):
            self.cache = None  # before the next fork is made
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

    def forward(self) -> list[int]:
        if self.policy.gamma is not None:
            self.cache.decay(self.policy.gamma)
        self.tokens = self.engine.model(self.tokens[:, None], cache=self.cache)[:, -1].argmax(-1)
        return self.tokens.tolist()

    def decode(self, count: int) -> dict:
        """So many tokens as in a real run, rounds where they are due. Seconds of each step, rounds
        left out, and of each round."""
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
        kept = [seconds for seconds in rounds if seconds > 1e-3]  # else no round, only the question
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
        from lethe_mini.generation.stats import allocated, kv_bytes

        cache = self.cache
        return {
            "kv_bytes": kv_bytes(cache),
            "kv_allocated": allocated(cache),
            "tokens": cache.held / len(cache.layers) / len(cache.seen),
            "seen": cache.seen[0],
            "round_seconds": getattr(self, "round_seconds", []),
        }


class Transformers(System):
    """transformers with sdpa and a DynamicCache: what `generate` does in each step, without the
    bookkeeping that `generate` adds to it."""

    model = cache = None

    def load(self) -> dict:
        import torch
        import transformers

        settings = self.settings
        torch.set_num_threads(settings["threads"])
        transformers.logging.set_verbosity_error()
        dtype = getattr(torch, settings["dtype"])
        auto = transformers.AutoModelForCausalLM
        if settings["shape"] is None:
            options = {"dtype": dtype, "attn_implementation": "sdpa"}
            model = auto.from_pretrained(settings["folder"], **options)
            self.model = model.to(settings["device"]).eval()
        else:
            self.model = self._random_model(dtype)
        weights = {p.data_ptr(): p for p in self.model.parameters()}
        step = sum(p.nbytes for p in weights.values())
        if not self.model.config.tie_word_embeddings:
            step -= self.model.get_input_embeddings().weight.nbytes
        return {
            "weight_bytes": step,
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
            "threads": torch.get_num_threads(),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "attention": self.model.config._attn_implementation,
            "layers": self.model.config.num_hidden_layers,
        }

    def _random_model(self, dtype):
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        sizes = dict(SHAPES[self.settings["shape"]])
        config = AutoConfig.for_model(sizes.pop("model_type"), **sizes)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                config, dtype=dtype, attn_implementation="sdpa"
            )
        model = model.to_empty(device=self.settings["device"]).requires_grad_(False)
        model.tie_weights()
        fill_random(model.parameters())
        rope = model.model.rotary_emb  # its frequencies are in no checkpoint
        model.model.rotary_emb = type(rope)(config=config).to(self.settings["device"])
        return model.eval()

    def prefill(self, ids: list[int], batch: int) -> float:
        import torch
        from transformers import DynamicCache

        config = self.model.config
        heads, size = config.num_key_value_heads, self.model.dtype.itemsize
        D = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        token = 2 * heads * D * size * config.num_hidden_layers
        check_room(token * len(ids) * (batch + 1), self.settings)
        self.sync()
        start = time.perf_counter()
        tokens = torch.tensor([ids], device=self.model.device)
        self.cache = DynamicCache()
        out = self.model(tokens, **self.caching(), logits_to_keep=1)
        self.tokens = out.logits[:, -1].argmax(-1)
        self.chosen = self.tokens.tolist()
        seconds = time.perf_counter() - start
        if batch > 1:
            self.cache.batch_repeat_interleave(batch)
            self.tokens = self.tokens.repeat(batch)
        return seconds

    def forward(self) -> list[int]:
        out = self.model(self.tokens[:, None], **self.caching())
        self.tokens = out.logits[:, -1].argmax(-1)
        return self.tokens.tolist()

    def caching(self) -> dict:
        """The cache as forward takes it: transformers 5.24 gave the argument a new name."""
        takes = inspect.signature(self.model.forward).parameters
        return {"cache" if "cache" in takes else "past_key_values": self.cache, "use_cache": True}

    def held(self) -> dict:
        layers = self.cache.layers
        size = sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
        tokens = statistics.fmean(layer.keys.shape[2] for layer in layers)
        return {"kv_bytes": size, "kv_allocated": size, "tokens": tokens}


class KVPress(Transformers):
    """kvpress: transformers under its SnapKVPress in prefill and a DecodingPress around SnapKV's
    scores while decoding, to the same share of the cache at the same interval."""

    press = None

    def load(self) -> dict:
        import kvpress

        self.kvpress = kvpress
        from importlib.metadata import version

        facts = super().load()
        facts["versions"]["kvpress"] = version("kvpress")
        return facts

    def prefill(self, ids: list[int], batch: int) -> float:
        share, interval = self.settings["share"], self.settings["interval"]
        budget = max(16, round(share * len(ids)))
        scorer = self.kvpress.SnapKVPress
        width = min(64, budget // 2)  # SnapKV keeps the window it looks through
        self.close()
        before = scorer(compression_ratio=1 - budget / len(ids), window_size=width)
        with before(self.model):
            seconds = super().prefill(ids, batch)
        self.position = len(ids)
        self.press = self.kvpress.DecodingPress(
            base_press=scorer(window_size=width),
            compression_interval=interval,
            target_size=budget,
            hidden_states_buffer_size=2 * width,
        )(self.model)
        self.press.__enter__()
        return seconds

    def forward(self) -> list[int]:
        import torch

        # A pruned cache is shorter than the text, so the position has to be given.
        places = torch.full((len(self.tokens), 1), self.position, device=self.model.device)
        options = self.caching() | {"position_ids": places}
        self.tokens = self.model(self.tokens[:, None], **options).logits[:, -1].argmax(-1)
        self.position += 1
        return self.tokens.tolist()

    def close(self) -> None:
        if self.press is not None:
            self.press.__exit__(None, None, None)
            self.press = None

    def drop(self) -> dict:
        self.close()
        return super().drop()


class LlamaCpp(System):
    """llama.cpp through llama-cpp-python, weights in bfloat16 made from the demo's GGUF by its own
    quantizer. Keys and values are float16, its default; its flash attention is not the quicker
    choice on every CPU, so `flash` says auto (its default), on or off. Every sequence has its own
    stream of the cache, so that a batch reads as much as that of the others."""

    model = context = batch = None

    def load(self) -> dict:
        import llama_cpp

        self.lib = llama_cpp
        self._quiet = llama_cpp.llama_log_callback(lambda *_: None)  # kept: C holds no reference
        llama_cpp.llama_log_set(self._quiet, None)
        llama_cpp.llama_backend_init()
        path = self._bfloat16(Path(self.settings["gguf"]))
        options = llama_cpp.llama_model_default_params()
        options.n_gpu_layers = 0
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), options)
        if not self.model:
            raise RuntimeError(f"llama.cpp cannot load {path}")
        self.vocab = llama_cpp.llama_model_get_vocab(self.model)
        return {
            "weight_bytes": llama_cpp.llama_model_size(self.model),
            "versions": {"llama_cpp_python": llama_cpp.__version__},
            "threads": self.settings["threads"],
            "dtype": "bfloat16",
            "kv_dtype": "float16",
            "layers": llama_cpp.llama_model_n_layer(self.model),
            "system": llama_cpp.llama_print_system_info().decode(errors="replace").strip(),
        }

    def _bfloat16(self, gguf: Path) -> Path:
        """The file's weights in bfloat16, beside it; made once."""
        lib, path = self.lib, gguf.with_name(f"{gguf.stem}-bf16.gguf")
        if path.exists():
            return path
        options = lib.llama_model_quantize_default_params()
        options.ftype = lib.LLAMA_FTYPE_MOSTLY_BF16
        options.allow_requantize = True
        options.nthread = self.settings["threads"]
        unfinished = path.with_suffix(f".{os.getpid()}")
        if lib.llama_model_quantize(str(gguf).encode(), str(unfinished).encode(), options):
            raise RuntimeError(f"llama.cpp cannot make bfloat16 weights of {gguf}")
        unfinished.replace(path)
        return path

    def prefill(self, ids: list[int], batch: int) -> float:
        lib = self.lib
        options = lib.llama_context_default_params()
        room = -(-(len(ids) + self.settings["room"]) // 256) * 256  # it wants multiples of 256
        options.n_ctx, options.n_seq_max = room * batch, batch
        options.kv_unified = False
        kind = {"auto": "AUTO", "on": "ENABLED", "off": "DISABLED"}[self.settings["flash"]]
        options.flash_attn_type = getattr(lib, f"LLAMA_FLASH_ATTN_TYPE_{kind}")
        options.n_batch = options.n_ubatch = 512
        options.n_threads = options.n_threads_batch = self.settings["threads"]
        heads = lib.llama_model_n_head_kv(self.model)
        D = lib.llama_model_n_embd(self.model) // lib.llama_model_n_head(self.model)
        self.token_bytes = 2 * 2 * heads * D * lib.llama_model_n_layer(self.model)
        check_room(self.token_bytes * room * batch, self.settings)
        self.context = lib.llama_init_from_model(self.model, options)
        if not self.context:
            raise OutOfMemoryError("llama.cpp cannot make the context")
        self.batch = lib.llama_batch_init(max(512, batch), 0, 1)
        start = time.perf_counter()
        for first in range(0, len(ids), 512):
            part = ids[first : first + 512]
            rows = [(token, first + i, 0) for i, token in enumerate(part)]
            self._decode(rows, last_only=True)
        first_token = self._argmax(len(part) - 1)
        seconds = time.perf_counter() - start
        memory = lib.llama_get_memory(self.context)
        for row in range(1, batch):
            lib.llama_memory_seq_cp(memory, 0, row, -1, -1)
        self.tokens, self.position = [first_token] * batch, len(ids)
        self.chosen, self.room = [first_token], room * batch
        return seconds

    def _decode(self, rows: list[tuple[int, int, int]], last_only: bool = False) -> None:
        """rows: token, position, sequence. last_only: logits for the last alone."""
        batch, self.batch.n_tokens = self.batch, len(rows)
        for i, (token, position, sequence) in enumerate(rows):
            batch.token[i], batch.pos[i] = token, position
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
            batch.logits[i] = not last_only or i == len(rows) - 1
        if status := self.lib.llama_decode(self.context, batch):
            raise RuntimeError(f"llama_decode: {status}")

    def _argmax(self, index: int) -> int:
        import numpy as np

        size = self.lib.llama_vocab_n_tokens(self.vocab)
        logits = self.lib.llama_get_logits_ith(self.context, index)
        return int(np.ctypeslib.as_array(logits, (size,)).argmax())

    def forward(self) -> list[int]:
        self._decode([(token, self.position, row) for row, token in enumerate(self.tokens)])
        self.position += 1
        self.tokens = [self._argmax(row) for row in range(len(self.tokens))]
        return self.tokens

    def held(self) -> dict:
        size = self.token_bytes * self.position * len(self.tokens)
        whole = self.token_bytes * self.room
        return {"kv_bytes": size, "kv_allocated": whole, "tokens": self.position}

    def drop(self) -> dict:
        if self.context:
            self.lib.llama_batch_free(self.batch)
            self.lib.llama_free(self.context)
            self.context = None
        return {}


class Machine:
    """No model: what the machine can do, and what the others are fed."""

    def __init__(self, settings: dict):
        self.settings = settings

    def load(self) -> dict:
        import torch

        sys.path.insert(0, str(ROOT))
        torch.set_num_threads(self.settings["threads"])
        device = self.settings["device"]
        if device == "cuda" and not torch.cuda.is_available():
            raise RuntimeError("this PyTorch sees no CUDA device")
        # More than any cache of the processor holds; a shared machine's may be hundreds of MB.
        self.block = torch.ones(self.settings["bandwidth_bytes"] // 4, device=device)
        facts = {"versions": {"torch": torch.__version__}, "threads": torch.get_num_threads()}
        if _on_cuda(self.settings):
            facts["gpu"] = torch.cuda.get_device_name()
            facts["gpu_memory"] = torch.cuda.get_device_properties(0).total_memory
        return facts

    def bandwidth(self, repetitions: int = 2) -> dict:
        """Bytes per second: the quickest of a few reductions over the block."""
        import torch

        block, best, name = self.block, 0.0, ""
        kinds = {
            "sum": block.sum,
            "amax": block.amax,
            "dot": lambda: torch.dot(block, block),
            "sum of int32": lambda: block.view(torch.int32).sum(),
        }
        for kind, reduce in kinds.items():
            for _ in range(repetitions):
                System.sync(self)
                start = time.perf_counter()
                reduce()
                System.sync(self)
                rate = block.nbytes / (time.perf_counter() - start)
                best, name = max((best, name), (rate, kind))
        return {"bytes_per_second": best, "reduction": name}

    def release(self) -> dict:
        """Gives the block back."""
        self.block = None
        return {}

    def folder(self, model: str) -> dict:
        """Where the checkpoint lies; fetched if need be."""
        from lethe_mini.checkpoint.load import resolve

        return {"folder": str(resolve(model))}

    def gguf(self) -> dict:
        """The demo's GGUF, kept in the user's cache."""
        from lethe_mini.checkpoint.demo import MEMBER, cache_root, fetch

        path = cache_root() / "benchmarks" / Path(MEMBER).name
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            fetch(path.parent).replace(path)
        return {"path": str(path)}

    def prompt(self, folder: str | None, shape: str | None, tokens: int) -> dict:
        """Ids of words in random order, the same for all systems; without a tokenizer random."""
        import random

        rng = random.Random(0)
        if folder is None:
            size = SHAPES[shape]["vocab_size"]
            return {"ids": [rng.randrange(size) for _ in range(tokens)]}
        from benchmarks.memory.batches import TEXT
        from lethe_mini.checkpoint.text import Text

        text, ids = Text(Path(folder)), []
        while len(ids) < tokens:
            words = " ".join(rng.choices(TEXT.split(), k=200))
            ids += text.encode(words, add_special_tokens=False)
        return {"ids": ids[:tokens]}


SYSTEMS = {
    "ours": Ours,
    "transformers": Transformers,
    "kvpress": KVPress,
    "llama.cpp": LlamaCpp,
    "machine": Machine,
}


# -- the pipe --------------------------------------------------------------------------------------


def answer(system, name: str, options: dict) -> dict:
    """What the system says; an error is an answer too."""
    try:
        return getattr(system, name)(**options)
    except (OutOfMemoryError, MemoryError) as error:
        problem = {"out_of_memory": True, "error": str(error) or "out of memory"}
    except Exception as error:
        memory = type(error).__name__ == "OutOfMemoryError" or "can't allocate" in str(error)
        line = " ".join(str(error).split())[:300]
        problem = {"out_of_memory": memory, "error": f"{type(error).__name__}: {line}"}
    # Here the traceback is gone, and with it what its frames held.
    if isinstance(system, System):
        system.drop()
    return problem


def serve(kind: str, requests, replies) -> None:
    """Answers until the input ends. The first request's settings make the system."""
    system = None
    for line in requests:
        request = json.loads(line)
        name = request.pop("do")
        if name == "load":
            system = SYSTEMS[kind](request.pop("settings"))
        reply = answer(system, name, request)
        if name == "load" and "error" not in reply:
            reply["resident"] = resident(system.settings)
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


def main() -> None:
    # Ctrl-C is for the parent, which then closes the pipe.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # What libraries print must not come between the answers.
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    try:
        import torch
    except ImportError:  # llama.cpp's interpreter may do without
        serve(sys.argv[1], sys.stdin, replies)
        return
    with torch.inference_mode():
        serve(sys.argv[1], sys.stdin, replies)


if __name__ == "__main__":
    main()
