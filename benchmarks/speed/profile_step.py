"""Where a decoding step's time goes: projections, attention, scoring, rounds, sampling, the rest.

    python -m benchmarks.speed.profile_step [--batch 1] [--length 4000] [--budget 340] [--compile]
        [--json FILE]

In eager mode, clocks are wrapped around the package's functions and modules from outside; the
package itself is not changed. A clock stops while another one inside it runs, so that the parts add
up to the whole. The clocks cost time themselves. So steps are timed without clocks, too, in turns
with the others, and the parts are scaled to these. What scoring costs is also found by difference:
a policy that keeps scores and never prunes, less the full cache at the same length. Rounds are
timed and divided by the interval.

`operators` is the time inside PyTorch's operators, by its profiler. The rest of a step is Python,
and PyTorch's way from one operator to the next. With --compile there are no functions to wrap, so
only this division is made: the kernels, what runs beside them, and the host.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch

import lethe_mini.model as model_module
from benchmarks.common.commands import user_errors
from benchmarks.common.hardware import commit, hardware
from benchmarks.common.results import write_json
from benchmarks.common.words import word_ids
from benchmarks.speed.ours import Ours
from benchmarks.speed.rows import quartiles
from lethe_mini.cache import KVCache, LayerCache
from lethe_mini.checkpoint.load import resolve
from lethe_mini.checkpoint.text import Text
from lethe_mini.policy import Lethe

OVERALL = "everything else"
NEVER = "lethe-plus, never prunes"
# Functions that a step goes through, and the part that each belongs to. Without one of them its
# time counts for its caller.
FUNCTIONS = {
    "linear": "projections",
    "attend": "attention",
    "rotate": "RoPE",
    "rope_cos_sin": "RoPE",
    "write": "cache: writing",
    "causal_mask": "attention",
}
METHODS = {
    (Lethe, "decay"): "scoring: decay",
    (KVCache, "reserve"): "cache: bookkeeping",
    (KVCache, "count"): "cache: bookkeeping",
    (LayerCache, "place"): "cache: bookkeeping",
}


class Clocks:
    """Time per part, exclusive: a part's clock stands still while a wrapped call inside it runs."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self.undo: list[tuple] = []
        self.inner: list[float] = []  # per open call, seconds of the calls inside it

    def wrap(self, owner, name: str, part: str) -> None:
        original = getattr(owner, name, None)
        if original is None:
            return
        seconds, inner, now = self.seconds, self.inner, time.perf_counter
        seconds.setdefault(part, 0.0)

        def timed(*args, **kwargs):
            inner.append(0.0)
            start = now()
            try:
                return original(*args, **kwargs)
            finally:
                took = now() - start
                seconds[part] += took - inner.pop()
                if inner:
                    inner[-1] += took

        own = name in vars(owner)  # if it is inherited, deleting the wrapper restores it
        self.undo.append((owner, name, original, own))
        setattr(owner, name, timed)

    def wrap_model(self, model) -> None:
        for name, part in FUNCTIONS.items():
            self.wrap(model_module, name, part)
        for (owner, name), part in METHODS.items():
            self.wrap(owner, name, part)
        for module in model.modules():
            kind = type(module).__name__
            if isinstance(module, torch.nn.Linear):
                self.wrap(module, "forward", "projections")
            elif kind.endswith("Norm"):
                self.wrap(module, "forward", "norms")
            elif kind == "MLP":
                self.wrap(module, "forward", "SiLU and product")
            elif module is model:
                self.wrap(module, "forward", "embedding, logits to float32")
            elif not isinstance(module, torch.nn.ModuleList | torch.nn.Embedding):
                self.wrap(module, "forward", "layers: residuals, views")

    def unwrap(self) -> None:
        for owner, name, original, own in reversed(self.undo):
            if own:
                setattr(owner, name, original)
            else:
                delattr(owner, name)
        self.undo = []


def timed_steps(system: Ours, count: int) -> float:
    """Seconds a step, median."""
    return statistics.median(system.steps(count)["step_seconds"])


def parts(system: Ours, steps: int, turns: int) -> dict:
    """Seconds a step by part, and bare. Wrapped and bare steps take turns."""
    clocks, bare, wrapped = Clocks(), [], 0.0
    for _ in range(turns):
        bare += system.steps(steps)["step_seconds"]
        clocks.wrap_model(system.engine.model)
        clocks.wrap(system, "forward", "sampling: argmax, to the host")
        try:
            wrapped += sum(system.steps(steps, warm=0)["step_seconds"])
        finally:
            clocks.unwrap()
    clocks.seconds[OVERALL] = max(0.0, wrapped - sum(clocks.seconds.values()))
    scale = statistics.median(bare) / max(wrapped, 1e-12)
    shares = {part: seconds * scale for part, seconds in clocks.seconds.items()}
    return {"step": statistics.median(bare), "wrapped": wrapped / (turns * steps), "parts": shares}


def operators(system: Ours, steps: int) -> dict:
    """Seconds a step inside operators, by PyTorch's profiler, and the costliest of them."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    cuda = system.engine.device.type == "cuda"
    if cuda:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        start = time.perf_counter()
        for _ in range(steps):
            system.forward()
        system.sync()
        seconds = (time.perf_counter() - start) / steps
    key = "self_device_time_total" if cuda else "self_cpu_time_total"
    events = [e for e in profiler.key_averages() if not e.key.startswith(("ProfilerStep", "Torch"))]
    total = sum(getattr(event, key) for event in events)
    ranked = sorted(events, key=lambda event: -getattr(event, key))[:12]
    found = [
        {
            "operator": event.key,
            "seconds": getattr(event, key) / 1e6 / steps,
            "calls": event.count / steps,
        }
        for event in ranked
    ]
    fused = sum(getattr(e, key) for e in events if "fused" in e.key or "graph_" in e.key)
    return {
        "step_under_profiler": seconds,
        "operators": total / 1e6 / steps,
        "fused": fused / 1e6 / steps,
        "calls": sum(event.count for event in events) / steps,
        "costliest": found,
    }


def measure(args: argparse.Namespace) -> dict:
    folder = str(resolve(args.model))
    settings = {
        "folder": folder,
        "shape": None,
        "device": args.device,
        "dtype": args.dtype,
        "threads": args.threads or torch.get_num_threads(),
        "interval": args.interval,
        "compile": args.compile,
        "share": None,
        "budget": None,
        "policy": "full",
    }
    if args.compile:  # gives the compiled kernels names in the profile
        import torch._inductor.config as inductor

        inductor.cpp.enable_kernel_profile = True
    ids = word_ids(Text(Path(folder)), args.length)
    full = Ours(settings)
    full.load()
    systems = {"full": full}
    budgets = {NEVER: None, f"lethe-plus, budget {args.budget}": args.budget}
    for name, budget in budgets.items():
        systems[name] = Ours({**settings, "policy": "lethe-plus", "budget": budget})
        systems[name].engine = full.engine
    facts = {"settings": {**vars(args), **settings, "json": None}, "systems": {}}
    facts |= {"hardware": hardware(), "commit": commit()}
    for system in systems.values():
        system.fill(ids, args.batch)
        system.steps(0, warm=3)
    bare: dict[str, list[float]] = {name: [] for name in systems}
    for _ in range(args.turns):
        for name, system in systems.items():
            bare[name].append(timed_steps(system, args.steps))
    for name, system in systems.items():
        found = {"step": statistics.median(bare[name]), "step_quartiles": quartiles(bare[name])}
        if not args.compile:
            split = parts(system, args.steps, args.turns)
            scale = found["step"] / split["step"]  # the turns of all systems lay side by side
            found["parts"] = {part: scale * value for part, value in split["parts"].items()}
            found["step_wrapped"] = split["wrapped"]
        found |= operators(system, args.steps)
        if system.round_seconds:
            found["round_seconds"] = statistics.median(system.round_seconds)
            found["rounds"] = found["round_seconds"] / args.interval
        facts["systems"][name] = found
    scored, plain = bare[NEVER], bare["full"]
    differences = [a - b for a, b in zip(scored, plain, strict=True)]
    facts["scoring"] = statistics.median(differences)
    return facts


def show(facts: dict) -> str:
    """Markdown tables: parts, then operators."""
    settings, systems = facts["settings"], facts["systems"]
    mode = "compiled" if settings["compile"] else "eager"
    lines = [
        f"{settings['model']}, {settings['dtype']} on {settings['device']}, {mode}, "
        f"batch {settings['batch']}, {settings['length']:,} tokens; ms a step",
        f"{facts['hardware']}, commit {facts['commit']}",
        "",
        "| part | " + " | ".join(systems) + " |",
        "|---|" + "---:|" * len(systems),
    ]

    def line(name: str, values: list[float | None], whole: list[float]) -> None:
        cells = [
            "" if value is None else f"{1e3 * value:.2f} ({value / total:.0%})"
            for value, total in zip(values, whole, strict=True)
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")

    found = list(systems.values())
    whole = [one["step"] for one in found]
    names = list(dict.fromkeys(part for one in found for part in one.get("parts", ())))
    ranked = sorted(names, key=lambda part: -max(one["parts"].get(part, 0) for one in found))
    for part in ranked:
        values = [one["parts"].get(part) for one in found]
        if max(value or 0 for value in values) > 0:
            line(part, values, whole)
    line("a step", whole, whole)
    line("rounds, shared out", [one.get("rounds") for one in found], whole)
    lines.append(f"\nscoring, by substitution: {1e3 * facts['scoring']:.2f} ms a step")
    lines += ["", "| under PyTorch's profiler | " + " | ".join(systems) + " |"]
    lines.append("|---|" + "---:|" * len(systems))
    profiled = [one["step_under_profiler"] for one in found]
    line("inside operators", [one["operators"] for one in found], profiled)
    if settings["compile"]:
        line("of these, compiled kernels", [one["fused"] for one in found], profiled)
    host = [max(0.0, one["step_under_profiler"] - one["operators"]) for one in found]
    line("host: Python, dispatch", host, profiled)
    line("a step", profiled, profiled)
    calls = " | ".join(f"{one['calls']:,.0f}" for one in found)
    lines.append(f"| calls of operators | {calls} |")
    lines += ["", "| operator | calls a step | ms a step |", "|---|---:|---:|"]
    lines += [
        f"| {one['operator'][:70]} | {one['calls']:.0f} | {1e3 * one['seconds']:.2f} |"
        for one in found[0]["costliest"]
    ]
    return "\n".join([*lines, "", "(the costliest operators of the full cache)"])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default="demo", help="a folder, a hub id or demo (default: %(default)s)")
    add("--device", default="cpu", help="default: %(default)s")
    add("--dtype", default="bfloat16", choices=["bfloat16", "float32", "float16"],
        help="default: %(default)s")  # fmt: skip
    add("--threads", type=int, help="default: PyTorch's")
    add("--batch", type=int, default=1, help="default: %(default)s")
    add("--length", type=int, default=4000, help="tokens in the cache (default: %(default)s)")
    add("--budget", type=int, default=340, help="of LethePlus (default: %(default)s)")
    add("--interval", type=int, default=128, help="tokens between rounds (default: %(default)s)")
    add("--steps", type=int, default=5, help="in a turn (default: %(default)s)")
    add("--turns", type=int, default=4, help="default: %(default)s")
    add("--compile", action="store_true", help="through torch.compile")
    add("--json", type=Path, help="also write the figures to this file")
    args = parser.parse_args(argv)
    if min(args.batch, args.length, args.budget, args.interval, args.steps, args.turns) < 1:
        parser.error("sizes and counts should be at least 1")
    with user_errors(), torch.inference_mode():
        facts = measure(args)
        print(show(facts))
        write_json(args.json, args, facts)
    return 0


if __name__ == "__main__":
    sys.exit(main())
