"""One measured system in a process of its own, driven by decode.py through a pipe.

    python -m benchmarks.speed.decode_worker SYSTEM          (from the repository root)

The worker reads one JSON request a line from standard input and answers with one line of JSON.
Between two requests it waits for input and uses no processor. Systems are `ours`, `transformers`,
`pruned` (our SnapKV inside it), `kvpress` and `llama.cpp`; `machine` has no model, measures the
read bandwidth and makes prompts. `kvpress-text` reads given texts for benchmarks.quality.kvpress.
Another engine may bring an interpreter with neither torch nor this package, so everything here is
imported late.

What every system with a model does:

- `load`  -> what is loaded: versions, threads, bytes of weights a step reads, bytes of a token
- `fill`  -> reads a prompt and copies its cache for every sequence; seconds to the first token
- `steps` -> decodes that many tokens for every sequence, greedily; seconds of each
- `drop`  -> frees the cache
"""

import argparse
import importlib
import json
import os
import signal
import sys

from benchmarks.speed.system import OutOfMemoryError, System, resident

SYSTEMS = {
    "ours": "benchmarks.speed.ours:Ours",
    "machine": "benchmarks.speed.ours:Machine",
    "transformers": "benchmarks.speed.peers:Transformers",
    "pruned": "benchmarks.speed.peers:Pruned",
    "kvpress": "benchmarks.speed.peers:KVPress",
    "kvpress-text": "benchmarks.quality.kvpress_worker:Reading",
    "llama.cpp": "benchmarks.speed.peers:LlamaCpp",
}


def make_system(kind: str, settings: dict):
    """The system of this name."""
    module, _, name = SYSTEMS[kind].partition(":")
    return getattr(importlib.import_module(module), name)(settings)


def answer(system, name: str, options: dict) -> dict:
    """What the system answers. An error is an answer, too."""
    try:
        return getattr(system, name)(**options)
    except (OutOfMemoryError, MemoryError) as error:
        problem = {"out_of_memory": True, "error": str(error) or "out of memory"}
    except Exception as error:
        memory = type(error).__name__ == "OutOfMemoryError" or "can't allocate" in str(error)
        line = " ".join(str(error).split())[:300]
        problem = {"out_of_memory": memory, "error": f"{type(error).__name__}: {line}"}
    # The traceback is gone here, and with it the tensors that its frames held.
    if isinstance(system, System):
        system.drop()
    return problem


def serve(kind: str, requests, replies) -> None:
    """Answers until the input ends. The first request, `load`, brings the system's settings."""
    system = None
    for line in requests:
        request = json.loads(line)
        name = request.pop("do")
        if name == "load":
            system = make_system(kind, request.pop("settings"))
        reply = answer(system, name, request)
        if name == "load" and "error" not in reply:
            reply["resident"] = resident(system.settings)
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("system", choices=[*SYSTEMS], help="what to measure")
    kind = parser.parse_args().system
    # Ctrl-C is for the parent, which then closes the pipe.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # What libraries print must not come between the answers.
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    try:
        import torch
    except ImportError:  # llama.cpp's interpreter may do without
        serve(kind, sys.stdin, replies)
        return
    with torch.inference_mode():
        serve(kind, sys.stdin, replies)


if __name__ == "__main__":
    main()
