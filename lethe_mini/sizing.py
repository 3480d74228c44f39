"""What fits where: the bytes of weights, cache and working room on each of several devices.

    python -m lethe_mini.sizing --shape llama-70b --devices 3 --memory 80GB --batch 16 \
        --length 20000 --budget 8.3%

Weights are counted on a model without storage, built of the same modules. A slot's bytes are those
of an empty cache, and its capacity grows and shrinks by `LayerCache.capacity_for` at the tokens
where the policy has its rounds. Working room counts the largest tensors that are there at one
time: while a prompt is read beside the batch, in a decoding step, and in a round. What CUDA itself
takes is not counted. GB are 10^9 bytes.
"""

import argparse
import json
import re
import sys
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace

import torch

from .app.parser import Parser, parse_budget
from .cache import KVCache, LayerCache
from .checkpoint.config import DTYPES, parse_config, read_config
from .checkpoint.load import resolve
from .config import ModelConfig
from .errors import UserError
from .experts import COPIED, SORTED
from .kernels import MASS_BLOCK, PREFILL_CHUNK, best_size
from .model import Transformer
from .options import show_budget
from .parallel import MODES, by_heads, by_layers, shares
from .policy import FullKV, Lethe, Policy

SHAPES = json.loads(Path(__file__).with_name("shapes.json").read_text(encoding="utf-8"))
UNITS = {"MB": 10**6, "GB": 10**9, "MiB": 1 << 20, "GiB": 1 << 30}
FLOAT = 4  # bytes of what is computed in float32


@dataclass(frozen=True)
class Shape:
    """What one device, or all, hold of a model, in numbers rather than bytes. head: with the norm
    before it, less the weight that a tied one shares with the embedding."""

    config: ModelConfig
    embedding: int
    layers: tuple[int, ...]
    head: int

    @property
    def weights(self) -> int:
        return self.embedding + sum(self.layers) + self.head


def count(config: ModelConfig) -> Shape:
    """A model's numbers, from its modules."""
    with torch.device("meta"):
        model = Transformer(config)
    parts = [sum(p.numel() for p in part.parameters()) for part in model.layers]
    embedding = model.embed_tokens.weight.numel()
    total = sum(p.numel() for p in model.parameters())
    return Shape(config, embedding, tuple(parts), total - embedding - sum(parts))


def latent(data: dict) -> Shape:
    """DeepSeek-V3's numbers, from its config.json; no module here computes it. A slot is one vector
    for all heads, half of which passes for its key and half for its value."""
    (hidden, heads, L, vocab), (q, kv, nope, rope, v), (dense, routed, shared, inner) = (
        [data[name] for name in names.split()]
        for names in (
            "hidden_size num_attention_heads num_hidden_layers vocab_size",
            "q_lora_rank kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim",
            "first_k_dense_replace n_routed_experts n_shared_experts moe_intermediate_size",
        )
    )
    queries = hidden * q + q + q * heads * (nope + rope)
    keys_and_values = hidden * (kv + rope) + kv + kv * heads * (nope + v)
    attention = queries + keys_and_values + heads * v * hidden + 2 * hidden  # with two norms
    mlp = 3 * hidden * data["intermediate_size"]
    experts = (routed + shared) * 3 * hidden * inner + routed * hidden + routed  # with the router
    layers = [attention + (mlp if index < dense else experts) for index in range(L)]
    sizes = {"num_key_value_heads": 1, "head_dim": (kv + rope) // 2}
    llama = {"architectures": ["LlamaForCausalLM"], "intermediate_size": data["intermediate_size"]}
    plain = {"hidden_size": hidden, "num_attention_heads": heads, "num_hidden_layers": L}
    config = replace(
        parse_config({**llama, **plain, **sizes, "vocab_size": vocab, "dtype": "bfloat16"}),
        num_experts=routed,
        num_experts_per_tok=data["num_experts_per_tok"] + shared,
        moe_intermediate_size=inner,
        expert_layers=tuple(range(dense, L)),
    )
    return Shape(config, vocab * hidden, tuple(layers), vocab * hidden + hidden)


def find_shape(name: str) -> Shape:
    """A published model's, by its name in shapes.json."""
    data = SHAPES[name]
    if "kv_lora_rank" in data:
        return latent(data)
    return count(parse_config({"dtype": "bfloat16", **data}))


# -- dividing --------------------------------------------------------------------------------------


@lru_cache
def tensor_shares(shape: Shape, devices: int) -> list[Shape]:
    """What each device holds, divided by heads and columns and by rows of the vocabulary; norms and
    routers are on every device. Raises UserError."""
    c = shape.config
    if devices == 1:
        return [shape]
    rows = shares(c.vocab_size, devices)
    parts = [by_heads(c, devices, rank) for rank in range(devices)]
    return [count(replace(c, vocab_size=n)) for c, n in zip(parts, rows, strict=True)]


# -- the cache -------------------------------------------------------------------------------------


def _empty(policy: Policy, device: torch.device) -> SimpleNamespace:
    """What `capacity_for` looks at of a layer without storage."""
    return SimpleNamespace(notes=policy.notes(), gone=SimpleNamespace(device=device), capacity=0)


@lru_cache
def most_slots(policy: Policy, prompt: int, length: int, device: torch.device) -> tuple[int, int]:
    """Slots of a layer's storage, at most, from the round after the prompt to the last token, where
    the budget divides evenly over the layers; and where another sequence may join at any token."""
    layer = _empty(policy, device)
    cache = SimpleNamespace(layers=[layer], prompt=[prompt])
    held = most = joined = 0
    for seen in range(prompt, length + 1):
        held = prompt if seen == prompt else held + 1
        layer.lengths, cache.seen = [held], [seen]
        if any(policy.due(cache, prefilled=seen == prompt)):
            held = min(held, policy.limit(prompt, seen))
            layer.capacity = LayerCache.capacity_for(layer, held)
        if held > layer.capacity:
            layer.capacity = LayerCache.capacity_for(layer, held)
        most = max(most, layer.capacity)
        joined = max(joined, LayerCache.capacity_for(_empty(policy, device), held))
    return most, max(most, joined)


def layer_bytes(config: ModelConfig, policy: Policy, batch: int, slots: int, dtype) -> int:
    """Of one layer's storage: keys, values, positions, scores and what else the policy notes."""
    one = replace(config, num_hidden_layers=1)
    cache = KVCache(one, batch, dtype, "meta", notes=policy.notes())
    cache.layers[0].resize(slots)
    _, *tensors = cache.tensors()  # the first is not the layer's
    return sum(tensor.nbytes for tensor in tensors)


# -- working room ----------------------------------------------------------------------------------


def inner_bytes(c: ModelConfig, rows: int, size: int, device: torch.device) -> int:
    """What the MLP or the experts of a layer make of so many rows, all at one time; size: bytes of
    a number."""
    mlp = 4 * rows * c.intermediate_size  # gate and up in one, one with its activation, the product
    k, M = c.num_experts_per_tok, c.moe_intermediate_size
    if not c.expert_layers:
        return mlp * size
    if rows >= best_size(SORTED, device):
        experts = 4 * rows * k * c.hidden_size  # sorted, what comes out, back in order, in shares
    elif COPIED * rows * k <= c.num_experts:
        experts = 3 * rows * k * M * c.hidden_size
    else:
        experts = rows * c.num_experts * (4 * M + c.hidden_size)
    return max(mlp if len(c.expert_layers) < c.num_hidden_layers else 0, experts) * size


def prompt_room(c: ModelConfig, policy: Policy, prompt: int, size: int, device) -> int:
    """While the last chunk of a prompt is read: what a layer makes of it."""
    T, H, D = min(prompt, best_size(PREFILL_CHUNK, device)), c.num_attention_heads, c.head_dim
    heads = (2 * H + c.num_key_value_heads) * D  # queries and keys before and after RoPE
    heads += (H + c.num_key_value_heads) * D  # what attention gives, and values
    block = min(T, best_size(MASS_BLOCK, device))
    # Logits of a block of queries and their softmax, while that of the block before is there.
    mass = 3 * FLOAT * H * block * prompt if policy.scored else 0
    hidden = T * c.hidden_size * size
    return T * heads * size + max(2 * hidden + mass, 3 * hidden + inner_bytes(c, T, size, device))


def step_room(c: ModelConfig, batch: int, slots: int, size: int, device) -> int:
    """A decoding step: attention of every head, the experts, or the logits of the vocabulary, with
    what sampling sorts."""
    attention = 2 * FLOAT * batch * c.num_attention_heads * slots
    logits = 4 * FLOAT * batch * c.vocab_size
    return max(attention, inner_bytes(c, batch, size, device), logits)


def round_room(c: ModelConfig, policy: Policy, layers: int, batch: int, slots: int, size: int):
    """A round: of every layer, which slots stay and how much they matter; of one, the slots in the
    order of that (8 bytes each), or its keys once more as they move."""
    of_heads = batch * c.num_key_value_heads * slots
    moved = of_heads * c.head_dim * size
    if not policy.scored:
        return moved
    return layers * (of_heads + FLOAT * batch * slots) + max(20 * of_heads, moved)


# -- one device ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """What is to fit. prompt, length: tokens of a sequence, at first and at last."""

    shape: Shape
    devices: int
    parallel: str  # "tensor" or "layers"
    dtype: torch.dtype
    prompt: int
    length: int
    device: torch.device  # its kind: storage grows by it

    def fits(self, policy: Policy, batch: int) -> list["Fit"]:
        """What each device holds. Raises UserError for devices too many."""
        slots = most_slots(policy, self.prompt, self.length, self.device)
        if self.parallel == "tensor":
            parts = tensor_shares(self.shape, self.devices)
            return [self._fit(s.config, s.layers, s.weights, policy, batch, slots) for s in parts]
        config = self.shape.config
        weights = list(self.shape.layers)
        tied = config.tie_word_embeddings and self.devices > 1
        head = self.shape.head + (self.shape.embedding if tied else 0)
        divided = by_layers(config, weights, self.shape.embedding, head, self.devices)
        weights[0] += self.shape.embedding
        weights[-1] += head
        mine = [[weights[index] for index in run] for run in divided]
        return [self._fit(config, one, sum(one), policy, batch, slots) for one in mine]

    def fullest(self, policy: Policy, batch: int) -> "Fit":
        """The device that holds most."""
        return max(self.fits(policy, batch), key=lambda fit: fit.total)

    def _fit(self, config, of_layers, numbers: int, policy, batch: int, slots) -> "Fit":
        """A device that holds these layers with this config, and so many numbers in all."""
        layers, size, device = len(of_layers), self.dtype.itemsize, self.device

        def cache(batch: int, slots: int) -> int:
            return layers * layer_bytes(config, policy, batch, slots, self.dtype)

        mine, joined = (cache(batch, n) for n in slots)
        # A prompt is read beside a batch that lacks one sequence, and holds all its tokens.
        own = cache(1, LayerCache.capacity_for(_empty(policy, device), self.prompt))
        own += prompt_room(config, policy, self.prompt, size, device) - joined // batch
        step = step_room(config, batch, slots[1], size, device)
        pruning = round_room(config, policy, layers, batch, slots[1], size)
        room = joined - mine + max(own, step, pruning)
        return Fit(layers, config.num_key_value_heads, numbers * size, mine, room)

    def largest_batch(self, policy: Policy, memory: int) -> int:
        """How many sequences fit; 0: not even one."""
        low, high = 0, 1
        while self.fullest(policy, high).total <= memory:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            fits = self.fullest(policy, middle).total <= memory
            low, high = (middle, high) if fits else (low, middle)
        return low


@dataclass(frozen=True)
class Fit:
    """What a device holds, and its bytes. room: the most that a prompt, a step or a round needs
    beside weights and cache."""

    layers: int
    kv_heads: int
    weights: int
    cache: int
    room: int

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.room


# -- the command -----------------------------------------------------------------------------------


def parse_memory(text: str) -> int:
    """80GB, 80GiB or 512MB, in bytes."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(MB|GB|MiB|GiB)", text)
    if not found or not float(found[1]):
        raise argparse.ArgumentTypeError(f"should be a size such as 80GB or 80GiB, not {text!r}")
    return int(float(found[1]) * UNITS[found[2]])


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """Raises UserError."""
    parser = Parser(
        prog="python -m lethe_mini.sizing",
        description="What fits where: weights, cache and working room, and the largest batch.",
    )
    add, default = parser.add_argument, "(default: %(default)s)"
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--shape", choices=SHAPES, help="a published model")
    model.add_argument("--model", help="a folder, a hub id, reasoner or demo")
    add(
        "--dtype", default="auto", choices=("auto", *DTYPES), help="auto: as the model is published"
    )
    add("--devices", type=int, default=1, help=default)
    add("--parallel", default="tensor", choices=MODES, help="how they divide a "
        f"model: by heads and columns, or by layers {default}")  # fmt: skip
    add("--device", default="cuda", choices=("cuda", "cpu"), help=f"kind of the devices {default}")
    add("--memory", type=parse_memory, default="80GB", help=f"of each device {default}")
    add("--batch", type=int, default=1, help=f"sequences at once {default}")
    add("--prompt", type=int, default=128, help=f"tokens of a prompt {default}")
    add("--length", type=int, default=20000, help=f"tokens of a sequence at its end {default}")
    add("--budget", type=parse_budget, default=Lethe().budget, metavar="N|P%",
        help=f"Lethe's (default: {show_budget(Lethe().budget)})".replace("%", "%%"))  # fmt: skip
    args = parser.parse_args(argv)
    for name in ("devices", "batch", "prompt"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} should be at least 1, not {getattr(args, name)}")
    if args.length <= args.prompt:
        raise UserError(f"--length should be above --prompt ({args.prompt}), not {args.length}")
    if args.budget is None:
        raise UserError("without a budget only a run tells what Lethe keeps; give a number or P%")
    return args


def table(job: Job, policy: Policy, batch: int, memory: int) -> str:
    """Markdown: GB of the fullest device, with the full cache and pruned."""
    policies = (FullKV(), policy)
    fits = [job.fullest(one, batch) for one in policies]
    names = ("weights", "cache", "room", "total")
    rows = [[f"{getattr(fit, name) / 1e9:,.2f}" for fit in fits] for name in names]
    rows.append([f"{job.largest_batch(one, memory):,}" for one in policies])
    heads = ("weights", "cache", "working room", "together", "largest batch")
    lines = [f"| GB on the fullest device | full cache | {policy.name} |", "|---|---:|---:|"]
    pairs = zip(heads, rows, strict=True)
    return "\n".join([*lines, *(f"| {' | '.join((head, *row))} |" for head, row in pairs)])


def run(argv: list[str] | None) -> None:
    args = arguments(argv)
    policy = Lethe(budget=args.budget)
    policy.check_prompt(args.prompt)
    shape = find_shape(args.shape) if args.shape else count(read_config(resolve(args.model)))
    name = shape.config.dtype if args.dtype == "auto" else args.dtype
    dtype, device = getattr(torch, name), torch.device(args.device)
    job = Job(shape, args.devices, args.parallel, dtype, args.prompt, args.length, device)
    c, fits = shape.config, job.fits(policy, args.batch)
    tensor = args.parallel == "tensor"
    parts = ", ".join(str(fit.kv_heads if tensor else fit.layers) for fit in fits)
    of = f"{c.num_key_value_heads} key/value heads" if tensor else f"{c.num_hidden_layers} layers"
    slot = 2 * c.num_key_value_heads * c.head_dim * dtype.itemsize
    print(
        f"{args.shape or args.model}: {shape.weights / 1e9:,.2f} billion weights in {name}; a slot "
        f"has {slot:,} bytes in each of {c.num_hidden_layers} layers\n"
        f"devices: {args.devices} of {args.memory / 1e9:,.1f} GB ({args.device}), with {parts} of "
        f"{of}\n"
        f"batch: {args.batch} sequences that grow from {args.prompt:,} to {args.length:,} tokens; "
        f"budget {show_budget(args.budget)}\n\n{table(job, policy, args.batch, args.memory)}"
    )


def main(argv: list[str] | None = None) -> int:
    try:
        run(argv)
    except UserError as error:
        print("error:", *error.lines(), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
