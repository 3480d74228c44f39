"""Trains the small reasoner that ships in lethe_mini/reasoner, and writes it there.

    python -m benchmarks.reasoner.train --run FOLDER          # continues where the folder stopped
    python -m benchmarks.reasoner.train --run FOLDER --steps 6400 --decay 1800 --peak 0.5 \\
        --least 400 --weights 2 0.7 1
    python -m benchmarks.reasoner.train --run FOLDER --export lethe_mini/reasoner

The first command trains. The second continues with long texts only, and more of the hardest kind.
The third writes the model. Problems come from lethe_mini/reasoner/problems.py. Those of a step
depend only on the seed and the step's number, so an interrupted run continues exactly as it would
have gone. No problem is seen twice. The loss is taken on the chain, never on the prompt.

Texts begin short, since a small model learns on short texts to look things up, or never does. They
grow by a quarter whenever 98 % of every family's words are right. Evaluation draws from other seeds
(evaluate.py). Another number of threads rounds differently and gives another model, as good.
"""

import argparse
import json
import math
import os
import random
import time
from collections import deque
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from benchmarks.common.commands import user_errors
from lethe_mini import model as model_module
from lethe_mini.checkpoint.config import parse_config
from lethe_mini.checkpoint.load import named_weights
from lethe_mini.errors import UserError
from lethe_mini.jsonlines import Appender
from lethe_mini.model import Transformer
from lethe_mini.reasoner.problems import FAMILIES, REGISTERS, ROOMS, WORDS, problem

END = "<eos>"
IGNORED = -100
IDS = {word: index for index, word in enumerate([END, *WORDS])}
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": len(IDS),
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "attention_bias": True,
    "tie_word_embeddings": True,
    "eos_token_id": IDS[END],
    "dtype": "float32",
}
# Words of prompt and chain in each family: about so many for any problem, and so many per step.
WORDS_TAKEN = {"walk": (60, 24.0), "sum": (46, 12.4), "run": (32, 13.2)}
SHORTEST, FIRST, LONGEST = 100, 160, 1300  # words of a text: least, most at first, most at the end
MASTERED, TEXTS = 0.98, 100  # texts grow when so much of each family's last texts was right


def encode(text: str) -> list[int]:
    return [IDS[word] for word in text.replace("\n", " \n ").split(" ")]


def recall(rng: random.Random, length: float) -> tuple[list[int], list[int], list[int]]:
    """Facts like those of the families, then all of them again in other orders.

    A chain asks for a fact about every ten words, and a model that cannot look anything up yet
    learns little from it. Here every second or third word is a lookup, and only those count.
    """
    most = rng.randint(3, min(75, max(4, int(length / 9))))  # there are only so many names
    if rng.random() < 0.5:
        names = rng.sample(ROOMS, max(2, most // 3))
        facts = [
            [kind, name, rng.choice("0123456789")] for kind in ("digit", "note") for name in names
        ]
        facts += [[kind, name, rng.choice(ROOMS)] for kind in ("even", "odd") for name in names]
        facts = rng.sample(facts, most)
    else:
        facts = [[name, rng.choice("0123456789")] for name in rng.sample(REGISTERS, most)]
    prompt = [word for fact in facts for word in (".", *fact)] + [":"]
    chain, targets = [], []
    while len(prompt) + len(chain) < length:
        rng.shuffle(facts)
        for *key, found in facts:
            chain += [IDS[word] for word in (*key, found)]
            targets += [IGNORED] * len(key) + [IDS[found]]
    return [IDS[word] for word in prompt], chain, targets


def draw(
    rng: random.Random, families: dict[str, float], longest: float, tokens: int, least: int = 0
) -> list:
    """About `tokens` words of problems of about one length: (family, prompt, chain, targets)."""
    least = max(SHORTEST, longest / 8, least)
    length = math.exp(rng.uniform(math.log(least), math.log(longest)))
    rows = []
    for _ in range(max(4, int(tokens / length))):
        family = rng.choices(list(families), list(families.values()))[0]
        if family == "recall":
            rows.append((family, *recall(rng, length)))
            continue
        fixed, each = WORDS_TAKEN[family]
        size = max(4, round((length - fixed) / each * rng.uniform(0.8, 1)))
        one = problem(family, rng, min(size, FAMILIES[family][1]))
        chain = [*encode(one.chain), IDS[END]]
        rows.append((family, encode(one.prompt), chain, chain))
    return rows


def collate(rows: list) -> tuple[Tensor, Tensor]:
    """Inputs and targets (B, T); the target is IGNORED where there is nothing to learn."""
    longest = max(len(prompt) + len(chain) for _, prompt, chain, _ in rows) - 1
    shape = len(rows), -(-longest // 32) * 32
    inputs, targets = torch.zeros(shape, dtype=torch.long), torch.full(shape, IGNORED)
    for row, (_, prompt, chain, learned) in enumerate(rows):
        ids, end = prompt + chain, len(prompt) + len(chain) - 1
        inputs[row, :end] = torch.tensor(ids[:-1])
        targets[row, len(prompt) - 1 : end] = torch.tensor(learned)
    return inputs, targets


def attend(q: Tensor, k: Tensor, v: Tensor, mask=None, want_mass=False) -> tuple[Tensor, None]:
    """Causal attention as in lethe_mini.attention, in a form whose gradient is fast on a CPU."""
    group, dtype = q.shape[1] // k.shape[1], q.dtype
    q, k, v = (
        q.float(),
        k.float().repeat_interleave(group, 1),
        v.float().repeat_interleave(group, 1),
    )
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).to(dtype), None


def build(seed: int) -> Transformer:
    """An untrained model whose first two layers can roughly look things up.

    To find the word behind an earlier copy of the present word, one layer has to note for each word
    the one before it, and the next layer has to compare that with the present word. Neither helps
    without the other, and small models spend most of their training on finding both by chance. So
    both are there from the start.
    """
    torch.manual_seed(seed)
    model = Transformer(parse_config(CONFIG))
    model.init_rope("cpu")
    for name, weight in named_weights(model).items():
        if name.endswith("bias"):
            torch.nn.init.zeros_(weight)
        elif weight.dim() == 2:
            into_stream = name.endswith(("o_proj.weight", "down_proj.weight"))
            spread = weight.shape[1] ** -0.5 * (0.2 if into_stream else 1.0)
            torch.nn.init.normal_(weight, std=0.1 if "embed" in name else spread)
    look_back(model)
    look_up(model)
    return model


D = CONFIG["head_dim"]
SLOW = D // 4  # from here on RoPE's pairs are slow: they turn by less than 2 radians in 1,300 words
GROUP = CONFIG["num_attention_heads"] // CONFIG["num_key_value_heads"]


def weights_of_layer(model: Transformer, index: int) -> dict[str, torch.Tensor]:
    """A layer's attention weights, by their names."""
    start = f"layers.{index}.self_attn."
    weights = named_weights(model).items()
    return {name.removeprefix(start): weight for name, weight in weights if name.startswith(start)}


@torch.no_grad()
def look_back(model: Transformer, strength: float = 6.5) -> None:
    """Sets biases in layer 0: query head n of group 0 attends n + 1 words back, to any word.

    Before RoPE all keys have the same angle, and the query is turned back by n + 1 positions. Their
    product is largest where RoPE turns the two by just as much.
    """
    first = weights_of_layer(model, 0)
    first["k_proj.weight"][:D] *= 0.1  # so the word hardly matters
    first["q_proj.weight"][: GROUP * D] *= 0.1
    first["k_proj.bias"][:SLOW] = strength  # of the pairs (i, i + D/2), the fast ones
    for head in range(GROUP):
        angle = -(head + 1) * model.inv_freq[:SLOW]
        first["q_proj.bias"][head * D :][:SLOW] = strength * angle.cos()
        first["q_proj.bias"][head * D + D // 2 :][:SLOW] = strength * angle.sin()


@torch.no_grad()
def look_up(model: Transformer, written: float = 0.3) -> None:
    """Sets layer 1 to compare with the words before each word, along directions of their own.

    Group 0 compares the present word with the one before each word; group 1 the word before the
    present one with the word two before each.
    """
    first, second = (weights_of_layer(model, index) for index in (0, 1))
    axes = torch.linalg.qr(torch.randn(CONFIG["hidden_size"], (GROUP + 1) * D))[0].T
    word, *back = axes.split(D)  # directions of the word itself, and of the words before it
    first["v_proj.weight"][:D] = word
    for head in range(GROUP):
        first["o_proj.weight"][:, head * D : (head + 1) * D] = written * back[head].T
    first["o_proj.weight"][:, GROUP * D :] *= 0.2  # the rest of the layer begins small
    model.layers[0].mlp.down_proj.weight *= 0.2
    # Only pairs that RoPE hardly turns compare alike near and far.
    slow = torch.cat((torch.arange(SLOW, D // 2), torch.arange(D // 2 + SLOW, D)))
    used = slow.numel()
    # The word itself is weaker in the residual stream than what attention wrote there.
    pairs = (word, back[0], 5.0), (back[0], back[1], 2.0)
    for group, (wanted, held, strength) in enumerate(pairs):
        second["k_proj.weight"][group * D + slow] = held[:used]
        for head in range(group * GROUP, (group + 1) * GROUP):
            second["q_proj.weight"][head * D + slow] = strength * wanted[:used]


def optimizers(model: Transformer) -> list[torch.optim.Optimizer]:
    """Muon for the matrices (arXiv 2502.16982), AdamW for the embedding and the norms. Each sees
    the weights one by one, also where the model joins them: rows of a parameter and of its
    gradient, which therefore have to stay where they are."""
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    gradients = named_weights(model, lambda parameter: parameter.grad)
    weights = {name: torch.nn.Parameter(weight) for name, weight in named_weights(model).items()}
    for name, weight in weights.items():
        weight.grad = gradients[name]
    matrices = [w for n, w in weights.items() if w.dim() == 2 and "embed" not in n]
    rest = [w for n, w in weights.items() if w.dim() == 1 or "embed" in n]
    return [
        torch.optim.Muon(matrices, lr=0.02, momentum=0.95, weight_decay=0.01),
        torch.optim.AdamW(rest, lr=2e-3, betas=(0.9, 0.98), weight_decay=0.0),
    ]


class Run:
    """The state of a training run, which is what its checkpoint holds."""

    def __init__(self, folder: Path, seed: int):
        self.folder, self.seed = folder, seed
        self.step, self.tokens, self.seconds = 0, 0, 0.0  # processor seconds
        self.longest = float(FIRST)
        self.recent = {family: deque(maxlen=TEXTS) for family in FAMILIES}
        self.model = build(seed)
        self.optimizers = optimizers(self.model)
        self.rates = [[group["lr"] for group in o.param_groups] for o in self.optimizers]
        self.file = folder / "checkpoint.pt"
        if self.file.is_file():
            state = torch.load(self.file, weights_only=True)
            if state["seed"] != seed:
                raise UserError(
                    f"{self.file} has seed {state['seed']}, not {seed}; name another --run"
                )
            self.model.load_state_dict(state["model"])
            for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
            self.step, self.tokens, self.seconds = state["step"], state["tokens"], state["seconds"]
            self.longest = state["longest"]
            for family, shares in state["recent"].items():
                self.recent[family].extend(shares)

    def save(self) -> None:
        """Replaces the checkpoint in one step, so that a run may be killed at any time."""
        state = {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "seed": self.seed,
            "step": self.step,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "longest": self.longest,
            "recent": {family: list(shares) for family, shares in self.recent.items()},
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        torch.save(state, self.file.with_suffix(".new"))
        os.replace(self.file.with_suffix(".new"), self.file)


def train(run: Run, args: argparse.Namespace) -> None:
    model_module.attend = attend
    forward = torch.compile(run.model, dynamic=True) if args.compile else run.model
    families = dict(zip(FAMILIES, args.weights, strict=True))
    # words right, words, texts all right, texts
    counts = {family: [0, 0, 0, 0] for family in (*families, "recall")}
    while run.step < args.steps:
        started = time.process_time()
        run.step += 1
        rng = random.Random(f"train-{run.seed}-{run.step}")
        tokens = min(args.tokens, max(2048, int(run.longest * 14)))
        share = max(0.05, 0.3 - run.step / 1000) * sum(families.values())
        rows = draw(rng, {**families, "recall": share}, run.longest, tokens, args.least)
        inputs, targets = collate(rows)
        # Warm up, stay, then fall to zero over the last steps, whose number may change late.
        rate = args.peak * min(1.0, run.step / 100, (args.steps - run.step + 1) / args.decay)
        for optimizer, rates in zip(run.optimizers, run.rates, strict=True):
            for group, full in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = full * rate
        with torch.autocast("cpu", torch.bfloat16):
            logits = forward(inputs)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
        for optimizer in run.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)

        learned = targets >= 0
        right = (logits.detach().argmax(-1) == targets) & learned
        words, texts = learned.sum(1), (right == learned).all(1)
        for (family, *_), *found in zip(
            rows, right.sum(1).tolist(), words.tolist(), texts.tolist(), strict=True
        ):
            counts[family] = [a + b for a, b in zip(counts[family], [*found, 1], strict=True)]
            if family in run.recent:
                run.recent[family].append(found[0] / found[1])
        if all(sum(shares) >= MASTERED * TEXTS for shares in run.recent.values()):
            run.longest = min(LONGEST, run.longest * 1.25)
            for shares in run.recent.values():
                shares.clear()
        run.tokens += sum(len(prompt) + len(chain) for _, prompt, chain, _ in rows)
        run.seconds += time.process_time() - started
        if run.step % args.every == 0 or run.step == args.steps:
            run.save()
            note(run, loss.item(), rate, counts)
            counts = {family: [0, 0, 0, 0] for family in counts}


def note(run: Run, loss: float, rate: float, counts: dict[str, list[int]]) -> None:
    """Writes a line of the log: shares of right words and of right texts, before learning them."""
    line = {
        "step": run.step,
        "tokens": run.tokens,
        "processor_seconds": round(run.seconds),
        "longest": round(run.longest),
        "rate": round(rate, 4),
        "loss": round(loss, 5),
    }
    for family, (right, words, whole, texts) in counts.items():
        if texts:
            line[family] = [round(right / words, 5), round(whole / texts, 3)]
    print(json.dumps(line), flush=True)
    with Appender(run.folder / "log.jsonl") as file:
        file.write(json.dumps(line))


def build_tokenizer() -> Tokenizer:
    """A tokenizer with one token per word, and one for the end of a line."""
    tokenizer = Tokenizer(models.WordLevel(IDS, unk_token=END))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex("\n"), "isolated"),
            pre_tokenizers.Split(" ", "removed"),
        ]
    )
    # Joins words by spaces, but for the end of a line.
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.WordPiece(prefix="##", cleanup=False),
            decoders.Fuse(),
            decoders.Replace(" \n", "\n"),
            decoders.Replace("\n ", "\n"),
        ]
    )
    tokenizer.add_special_tokens([AddedToken(END, special=True)])
    return tokenizer


def export(model: Transformer, folder: Path) -> None:
    """Writes the model as a checkpoint folder, in float32."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=1) + "\n", encoding="utf-8")
    settings = {"eos_token": END}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings) + "\n", encoding="utf-8")
    build_tokenizer().save(str(folder / "tokenizer.json"))
    weights = {
        f"model.{name}": weight.detach().contiguous()
        for name, weight in named_weights(model).items()
    }
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--run", type=Path, required=True, help="folder for the checkpoint and the log")
    add("--export", type=Path, help="write the run's model to this folder instead of training")
    add("--seed", type=int, default=0, help="of weights and problems (default: %(default)s)")
    add("--steps", type=int, default=4600, help="of training, in all (default: %(default)s)")
    add("--decay", type=int, default=2400, help="last steps, in which the rate falls (%(default)s)")
    add(
        "--peak",
        type=float,
        default=1.0,
        help="highest learning rate, relative (default: %(default)s)",
    )
    add("--least", type=int, default=0, help="fewest words of a text (default: a few)")
    add("--tokens", type=int, default=4096, help="most words of a step (default: %(default)s)")
    add("--weights", type=float, nargs=len(FAMILIES), default=[1.0, 0.7, 1.0],
        help=f"weights of {', '.join(FAMILIES)} among the texts")  # fmt: skip
    add("--every", type=int, default=50, help="steps between checkpoints (default: %(default)s)")
    add("--compile", action="store_true", help="use torch.compile, which is a quarter faster")
    args = parser.parse_args(argv)
    with user_errors():
        run = Run(args.run, args.seed)
        if args.export is not None:
            export(run.model, args.export)
        else:
            train(run, args)


if __name__ == "__main__":
    main()
