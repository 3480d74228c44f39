"""Lethe (arXiv 2511.06029) by hand: python examples/lethe_by_hand.py [SEED]

A small model solves a puzzle while Lethe prunes its cache: for each layer, a dict of the tensors
keys, values (1, H_kv, S, D), positions, scores (1, H_kv, S). S is the number of tokens it holds.
"""

import random
import sys

import torch

from lethe_mini.checkpoint.load import load
from lethe_mini.reasoner.problems import WORDS, problem, solved

BUDGET, EVICT_THRESHOLD, INTERVAL = 0.25, 512, 128
SINKS, RECENT_RATIO, TAU, SEGMENTS, GAMMA = 4, 0.3, 400.0, 16, 0.99


def write(model, text: list[int], end: int = 0, most: int = 1500) -> list[int]:
    """Continues a text, at first its prompt, to the token `end` or to `most` tokens."""
    prompt, seen = len(text), 0
    H_kv, D = model.config.num_key_value_heads, model.config.head_dim
    k, s = torch.zeros(1, H_kv, 0, D), torch.zeros(1, H_kv, 0)
    cache = [{"keys": k, "values": k, "positions": s.int(), "scores": s} for _ in model.layers]
    while text[-1] != end and len(text) < most:
        # 1. Prefill: the model reads the whole prompt. 2. Decode: it reads the token it wrote last.
        T, positions = len(text) - seen, torch.arange(seen, len(text))[None]  # (1, T)
        angles = positions[:, None, :, None] * model.inv_freq  # (1, 1, T, D/2)
        x = model.embed_tokens(torch.tensor([text[seen:]]))  # (1, T, hidden)
        for block, layer in zip(model.layers, cache, strict=True):
            slots = positions - seen + layer["keys"].shape[2]  # (1, T), new ones at the end
            for name, t in layer.items():
                layer[name] = torch.cat((t, t.new_zeros(1, H_kv, T, *t.shape[3:])), dim=2)
            layer["scores"] *= GAMMA  # eq. 5; the block adds the attention that each key receives
            x, _ = block(x, angles.cos(), angles.sin(), positions, layer, slots)
        seen = len(text)
        prune(cache, prompt, seen)
        text = [*text, int(model.head(x[:, -1:]).argmax())]
    return text


def prune(cache: list[dict], prompt: int, seen: int) -> None:
    """A round over all layers, if it is time and they hold more than their budget."""
    held, protected = [layer["keys"].shape[2] for layer in cache], max(SINKS, prompt)
    total = len(cache) * max(int(BUDGET * seen), protected + int(BUDGET * EVICT_THRESHOLD))
    if (seen - prompt) % INTERVAL or seen <= EVICT_THRESHOLD or sum(held) <= total:
        return
    print(f"{seen} tokens seen: {sum(held)} held in all layers, {total} may stay")
    hoyer, salient = [], []
    for layer, S in zip(cache, held, strict=True):
        # 3. Score (eq. 2): over all heads. 4. Hoyer (eq. 1): 0 if all are equal, 1 if one has all.
        score = layer["scores"].sum(1)[0]  # (S,)
        a, root = score / score.max(), torch.tensor(S).sqrt()
        hoyer.append((root - a.sum() / a.square().sum().sqrt()) / (root - 1))
        # 5. Breakpoint (eq. 3): the first cut with v[0] / v[k] > TAU. Tokens before it are salient.
        order = S - 1 - score.flip(0).argsort(descending=True, stable=True)  # (S,) best slots first
        v, cuts = score[order], [i * S // SEGMENTS for i in range(1, SEGMENTS)]
        salient.append(order[: next((k for k in cuts if v[0] > TAU * v[k]), S)])
    # 6. Budget: level * Hoyer within bounds; the level rises until the shares add up.
    level, weights = 0.0, torch.stack(hoyer).double()
    for _ in range(1000):
        share = (level * weights).clamp(min=protected + 1).minimum(torch.tensor(held))  # (L,)
        level += float((total - share.sum()) / weights.sum())
    whole = share.int()  # the largest remainders are rounded up
    whole[(whole - share).argsort(stable=True)[: total - whole.sum()]] += 1
    # 7. Keep (eq. 4): prompt, sinks and recent tokens, and of the salient as many as have room.
    for layer, h, slots, n in zip(cache, hoyer, salient, whole.tolist(), strict=True):
        stays = layer["positions"][0, 0] < protected  # (S,)
        stays[-max(1, int(RECENT_RATIO * (n - protected))) :] = True
        stays[slots[~stays[slots]][: n - stays.sum()]] = True
        layer.update({name: t[:, :, stays] for name, t in layer.items()})
        print(f"  Hoyer {h:.2f}, {len(slots)} salient, room for {n}: {stays.sum()} kept")


if __name__ == "__main__":
    model, words = load("reasoner", device="cpu")[1], ["<end>", *WORDS]
    puzzle = problem("walk", random.Random(int(sys.argv[1]) if sys.argv[1:] else 2), size=40)
    text = write(model, [words.index(word) for word in puzzle.prompt.split()])
    text = " ".join(words[token] for token in text if token)
    print(text, f"The answer is {'right' if solved(puzzle, text) else 'wrong'}.", sep="\n")
