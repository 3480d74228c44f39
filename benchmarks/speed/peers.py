"""Other engines as measured systems. Each is imported only where it is loaded."""

import inspect
import os
import statistics
import time
from pathlib import Path

from benchmarks.speed.shapes import SHAPES, fill_random
from benchmarks.speed.system import OutOfMemoryError, System, check_room


class Transformers(System):
    """transformers with sdpa and a DynamicCache: what its `generate` does in each step, without
    its bookkeeping."""

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
        name = "cache" if "cache" in takes else "past_key_values"
        return {name: self.cache, "use_cache": True}

    def held(self) -> dict:
        layers = self.cache.layers
        size = sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
        tokens = statistics.fmean(layer.keys.shape[2] for layer in layers)
        return {"kv_bytes": size, "kv_allocated": size, "tokens": tokens}


def snapkv_sizes(share: float, tokens: int) -> tuple[int, int]:
    """The budget and the window of SnapKV's rows; it keeps the window it looks through."""
    budget = max(16, round(share * tokens))
    return budget, min(64, budget // 2)


class Pruned(Transformers):
    """Our SnapKV inside transformers, at the share and the interval of the row of kvpress."""

    def prefill(self, ids: list[int], batch: int) -> float:
        import torch

        from lethe_mini import SnapKV
        from lethe_mini.integrations.transformers import pruned

        budget, width = snapkv_sizes(self.settings["share"], len(ids))
        policy = SnapKV(
            budget=budget, interval=self.settings["interval"], window=width, protect_prompt=False
        )
        self.sync()
        start = time.perf_counter()
        tokens = torch.tensor([ids], device=self.model.device)
        self.cache = pruned(self.model, policy)
        out = self.model(tokens, **self.caching(), logits_to_keep=1)
        self.chosen = out.logits[:, -1].argmax(-1).tolist()
        self.cache.report()  # which prunes the prompt
        seconds = time.perf_counter() - start
        with torch.inference_mode(False):  # as the cache itself does
            self.cache.kv.select([0] * batch)
        self.tokens = torch.tensor(self.chosen * batch, device=self.model.device)
        return seconds

    def held(self) -> dict:
        from lethe_mini.generation.stats import kv_bytes

        report = self.cache.report()
        tokens = statistics.fmean(count for layers in report.kept for count in layers)
        return {
            "kv_bytes": kv_bytes(self.cache.kv),
            "kv_allocated": report.bytes,
            "tokens": tokens,
        }


class KVPress(Transformers):
    """kvpress: transformers with a SnapKVPress in prefill and, while decoding, a DecodingPress with
    SnapKV's scores, to the same share of the cache at the same interval."""

    press = None

    def load(self) -> dict:
        import kvpress

        self.kvpress = kvpress
        from importlib.metadata import version

        facts = super().load()
        facts["versions"]["kvpress"] = version("kvpress")
        return facts

    def prefill(self, ids: list[int], batch: int) -> float:
        budget, width = snapkv_sizes(self.settings["share"], len(ids))
        interval, scorer = self.settings["interval"], self.kvpress.SnapKVPress
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
    """llama.cpp through llama-cpp-python.

    Its own quantizer makes bfloat16 weights of the demo's GGUF. Keys and values are float16, its
    default. Its flash attention is slower on some CPUs, so `flash` is auto (its default), on or
    off. Every sequence has its own part of the cache, so that a batch reads as much as in the other
    systems.
    """

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
        """A file with the weights in bfloat16, made once, beside the given one."""
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
        """Decodes rows of (token, position, sequence). last_only: logits for the last row alone."""
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
