"""Time per token and KV memory against text length, full cache and LethePlus, as an SVG.

    python -m benchmarks.speed.decode --curve --json curve.json
    python -m benchmarks.speed.plot_decode curve.json [docs/speed.svg]

Needs matplotlib: pip install 'lethe-mini[plot]'.
"""

import argparse
import json
import sys
from pathlib import Path

from benchmarks import ROOT
from benchmarks.common.plots import INK, STYLE, draw_or_say, save

COLORS = {"full": "#d1662b", "lethe-plus": "#3a87c8"}
DASHES = {"ours eager": (0, (5, 2)), "ours compiled": "solid"}
MARKERS = {"full": "s", "lethe-plus": "o"}


def label(line: dict, alone: bool) -> str:
    """A line's name: the policy, and the mode if there are two."""
    what = "full cache"
    if line["policy"] != "full":
        what = f"LethePlus, budget {line['budget']}"
    return what if alone else f"{what}, {line['system'].removeprefix('ours ')}"


def spread(places: list[float], apart: float) -> list[float]:
    """The places of labels, moved up as little as needed, so that they stand `apart`."""
    moved, last = list(places), None
    for index in sorted(range(len(places)), key=lambda i: places[i]):
        if last is not None:
            moved[index] = max(moved[index], last + apart)
        last = moved[index]
    return moved


def draw(facts: dict, out: Path) -> None:
    """facts: what `decode --curve --json` wrote."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = facts["curve"]
    alone = len({line["system"] for line in lines}) == 1
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(1, 2, figsize=(10, 3.6))
        scale = 1 / lines[0]["batch"] if lines else 1.0
        kinds = (("ms", "ms per token", scale), ("kv_bytes", "KV memory, MB", 1e-6))
        for axes, (key, title, factor) in zip(panels, kinds, strict=True):
            ends = []
            drawn = lines
            if key == "kv_bytes":  # the same in both modes
                drawn = [line for line in lines if line["system"] == lines[-1]["system"]]
            for line in drawn:
                x = [point["tokens"] for point in line["points"]]
                y = [factor * point[key] for point in line["points"]]
                policy = line["policy"]
                axes.plot(
                    x,
                    y,
                    color=COLORS[policy],
                    linestyle="solid" if alone else DASHES[line["system"]],
                    marker=MARKERS[policy],
                    markevery=max(1, len(x) // 8),
                    markersize=5,
                    linewidth=1.6,
                )
                ends.append((x[-1], y[-1], label(line, alone or key == "kv_bytes"), policy))
            top = max(end[1] for end in ends)
            axes.set_ylim(0, None)
            span = max(top, axes.get_ylim()[1])
            for (x, _, name, policy), y in zip(
                ends, spread([end[1] for end in ends], 0.09 * span), strict=True
            ):
                axes.annotate(
                    name, (x, y), (6, 0), textcoords="offset points", va="center",
                    color=COLORS[policy],
                )  # fmt: skip
            axes.set_title(title, loc="left", fontsize=10)
            axes.set_xlabel("tokens in the text")
            axes.grid(axis="y", color=INK, alpha=0.25, linewidth=0.6)
        figure.tight_layout(w_pad=6)
        save(figure, out)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("json", type=Path, help="what `decode --curve --json` wrote")
    parser.add_argument("svg", type=Path, nargs="?", default=ROOT / "docs" / "speed.svg",
        help="the picture to write (default: docs/speed.svg)")  # fmt: skip
    args = parser.parse_args(argv)
    facts = json.loads(args.json.read_text(encoding="utf-8"))
    if not any(line["points"] for line in facts.get("curve", [])):
        print(f"{args.json} has no curve; write one with decode --curve --json", file=sys.stderr)
        return 2
    return draw_or_say(draw, facts, args.svg)


if __name__ == "__main__":
    sys.exit(main())
