"""Traces that no model made: large ones, and hostile ones."""

import numpy as np

from lethe_mini.lens.replay import pack, runs
from lethe_mini.lens.trace import Trace

RECENT = 0.3


def synthetic(
    tokens, layers, heads=1, interval=128, budget=512, prompt=41, alike=True, pieces=None
):
    """A run of so many tokens under a policy that keeps, of what is neither prompt nor recent, a
    uniform draw; heads draw alike or each for itself."""
    chance = np.random.default_rng(0)
    held = [[np.arange(0)] * heads for _ in range(layers)]
    rounds, before = [], 0
    for seen in range(prompt + interval, tokens, interval):
        held = [[np.append(head, np.arange(before, seen)) for head in layer] for layer in held]
        before = seen
        if len(held[0][0]) <= budget:
            continue
        record = {"seen": seen, "budget": [budget] * layers, "breakpoint": [None] * layers}
        record |= {"hoyer": chance.random(layers).round(4).tolist(), "dropped": []}
        record |= {"recent": [int(RECENT * budget)] * layers, "scores": [], "low": [], "high": []}
        for layer in held:
            union = np.unique(np.concatenate(layer))
            scores = pack(np.exp(4 * chance.standard_normal(len(union))))
            for name, value in zip(("scores", "low", "high"), scores, strict=True):
                record[name].append(value)
            dropped = []
            for head in layer[: 1 if alike else heads]:
                middle = head[(head >= prompt) & (head < seen - int(RECENT * budget))]
                dropped.append(np.sort(chance.choice(middle, len(head) - budget, replace=False)))
            record["dropped"].append([runs(positions) for positions in dropped])
            dropped = dropped * heads if alike else dropped
            layer[:] = [np.setdiff1d(a, b) for a, b in zip(layer, dropped, strict=True)]
        rounds.append(record)
    words = chance.choice(["the", "keeper", "of", "a", "light", "and", "sea"], tokens).tolist()
    trace = Trace()
    trace.data |= {"model": "synthetic", "layers": layers, "heads": heads}
    trace.data |= {"policy": {"name": "random", "budget": budget, "sinks": 4}}
    sequence = {"prompt": 0, "sample": 0, "prompt_tokens": prompt, "read": tokens - 1}
    sequence |= {"finish_reason": "length", "token_ids": list(range(tokens)), "rounds": rounds}
    sequence["pieces"] = pieces or [f" {word}" for word in words]
    trace.data["sequences"].append(sequence)
    return trace
