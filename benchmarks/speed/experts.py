"""A decoding step of a mixture of experts: does it cost what it reads?

    python -m benchmarks.speed.experts [--batch 1 2 4 8 16] [--layers 4] [--json FILE]

Random weights in the shape of Qwen3-30B-A3B, of which a few layers: 128 experts each, 8 for a
token. A step reads attention, the head, and the experts that its tokens chose; bytes over time
should stay what they are for a dense model. The rival is such a model: the same layers, with an MLP
that has as many weights as 8 experts. Both take steps in turns. With every token there are more
experts to read, until all are.
"""

import argparse
import time
from pathlib import Path

import torch

from benchmarks.common.commands import user_errors
from benchmarks.common.hardware import hardware
from benchmarks.common.results import write_json
from benchmarks.speed.ours import random_model
from benchmarks.speed.rows import quartiles
from benchmarks.speed.shapes import SHAPES
from lethe_mini.cache import KVCache
from lethe_mini.experts import Experts
from lethe_mini.model import Transformer

SHAPE = "qwen3-30b-a3b"
DENSE = "Qwen3ForCausalLM"


def pair(shape: str, layers: int, dtype: torch.dtype) -> tuple[Transformer, Transformer]:
    """The mixture, and the dense model whose MLP has as many weights as a token's experts."""
    sizes = SHAPES[shape] | {"num_hidden_layers": layers}
    inner = sizes["num_experts_per_tok"] * sizes["moe_intermediate_size"]
    dense = sizes | {"architectures": [DENSE], "intermediate_size": inner}
    return random_model(sizes, dtype), random_model(dense, dtype)


class Steps:
    """A model that takes steps of a batch, after a prompt of a few tokens."""

    def __init__(self, model: Transformer, batch: int):
        self.model, self.batch = model, batch
        self.cache = KVCache(model.config, batch, model.embed_tokens.weight.dtype)
        self.read: list[list[int]] = []  # by step: how many experts each layer read
        for layer in model.layers:
            if isinstance(layer.mlp, Experts):
                layer.mlp.gate.register_forward_hook(self._count)
        self.take(8)

    def _count(self, router, x, logits) -> None:
        chosen = logits.topk(self.model.config.num_experts_per_tok).indices
        self.read[-1].append(len(chosen.unique()))

    def take(self, tokens: int = 1) -> float:
        """Seconds of a step (or a prompt) of random tokens."""
        self.read.append([])
        ids = torch.randint(self.model.config.vocab_size, (self.batch, tokens))
        start = time.perf_counter()
        self.model(ids, cache=self.cache, last_only=True)
        return time.perf_counter() - start

    def bytes(self) -> int:
        """What the last step read: every weight but the embedding's and those of idle experts."""
        weights = sum(p.nbytes for p in self.model.parameters())
        weights -= self.model.embed_tokens.weight.nbytes
        for layer, read in zip(self.model.layers, self.read[-1], strict=False):
            mlp = layer.mlp
            one = mlp.gate_up_proj[0].nbytes + mlp.down_proj[0].nbytes
            weights -= (len(mlp.down_proj) - read) * one
        return weights


def row(models: tuple, batch: int, steps: int) -> dict:
    """Steps of both in turns: medians, quartiles, bytes read."""
    both = {name: Steps(m, batch) for name, m in zip(("mixture", "dense"), models, strict=True)}
    seconds: dict = {name: [] for name in both}
    sizes: dict = {name: [] for name in both}
    for _ in range(steps):
        for name, one in both.items():
            seconds[name].append(one.take())
            sizes[name].append(one.bytes())
    read = [n for step in both["mixture"].read[-steps:] for n in step]
    facts = {"batch": batch, "experts": sum(read) / len(read)}
    for name in both:
        size = sum(sizes[name]) / steps
        low, middle, high = quartiles(seconds[name])
        facts[name] = {"bytes": size, "seconds": middle, "quartiles": [low, high]}
        facts[name]["bandwidth"] = size / middle
    return facts


def line(facts: dict) -> str:
    """A line of the table."""
    cells = [facts["batch"], f"{facts['experts']:.0f}"]
    for name in ("mixture", "dense"):
        one = facts[name]
        low, high = (1000 * second for second in one["quartiles"])
        cells.append(f"{one['bytes'] / 1e9:.2f}")
        cells.append(f"{1000 * one['seconds']:.1f} [{low:.1f}, {high:.1f}]")
        cells.append(f"{one['bandwidth'] / 1e9:.1f}")
    return f"| {' | '.join(map(str, cells))} |"


HEAD = """\
| batch | experts read, of {experts} | GB | ms | GB/s | dense: GB | ms | GB/s |
|---:|---:|---:|---:|---:|---:|---:|---:|"""


@torch.inference_mode()
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    mixtures = [name for name, sizes in SHAPES.items() if "num_experts" in sizes]
    add("--shape", default=SHAPE, choices=mixtures, help="default: %(default)s")
    add("--layers", type=int, default=4, help="of the model (default: %(default)s)")
    add("--batch", type=int, nargs="+", default=[1, 2, 4, 8, 16], help="default: 1 2 4 8 16")
    add("--steps", type=int, default=25, help="of each (default: %(default)s)")
    add("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    add("--json", type=Path, help="also write the figures, with every setting, to this file")
    args = parser.parse_args(argv)
    with user_errors():
        torch.manual_seed(0)
        models = pair(args.shape, args.layers, getattr(torch, args.dtype))
        print(f"{args.shape}, {args.layers} layers, {args.dtype}; {hardware()}\n")
        print(HEAD.format(experts=models[0].config.num_experts))
        rows = []
        for batch in args.batch:
            rows.append(row(models, batch, args.steps))
            print(line(rows[-1]), flush=True)
        write_json(args.json, args, {"hardware": hardware(), "rows": rows})


if __name__ == "__main__":
    main()
