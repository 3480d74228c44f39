"""A process of a divided model, for test_parallel.py: runs jobs, and writes what came of each.

python ranks.py JOBS OUT, with the environment of torchrun. JOBS: a JSON list of `job`s. What the
first process writes to OUT0, the second writes to OUT1, and so on: per job the tokens of every
sequence, the positions held in every layer that is here, head by head, and some statistics; and
once more for its model, how many weights are here and by how many bytes loading them raised the
peak of memory.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from lethe_mini import Engine
from lethe_mini.generation.stats import memory_peak
from lethe_mini.parallel import leave
from lethe_mini.policies import POLICIES


def run(engine, job):
    """-> tokens; [a prompt's length, tokens seen, positions by layer and head] now and then; and
    statistics."""
    held = []

    def on_step(cache):
        for row, (prompt, seen) in enumerate(zip(cache.prompt, cache.seen, strict=True)):
            if seen % 5 == 0:
                layers = [x.positions[row, :, : x.lengths[row]].tolist() for x in cache.layers]
                held.append([prompt, seen, layers])

    policy = POLICIES[job["policy"]](**job["fields"])
    result = engine.generate(job["prompts"], policy, on_step=on_step, **job["options"])
    stats = {name: getattr(result.stats, name) for name in ("kv_bytes_final", "kv_reduction")}
    return [[one.token_ids for one in result.sequences], held, stats]


def main(jobs, out):
    engines, found = {}, []
    for job in json.loads(Path(jobs).read_text(encoding="utf-8")):
        key = (job["model"], job["parallel"])
        if key not in engines:
            engines, before = {}, memory_peak(torch.device("cpu"))
            engines[key] = Engine.from_pretrained(key[0], "cpu", "float32", parallel=key[1])
            grown = memory_peak(torch.device("cpu")) - before
        found.append(run(engines[key], job))
        weights = sum(p.numel() for p in engines[key].model.parameters())
        found[-1] = [*found[-1], weights, grown]
    Path(out + str(dist.get_rank())).write_text(json.dumps(found), encoding="utf-8")
    leave(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
