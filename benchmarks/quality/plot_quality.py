"""Accuracy against the share of the cache that is held, as an SVG and as Markdown tables.

    python -m benchmarks.quality.run reason --json reason.json
    python -m benchmarks.quality.plot_quality reason.json [docs/quality.svg] [--family walk]

The picture has a line per policy; the tables have a row per policy and a column per budget. Needs
matplotlib: pip install 'lethe-mini[plot]'.
"""

import argparse
import json
import sys
from pathlib import Path

from benchmarks import ROOT
from benchmarks.common.plots import INK, STYLE, draw_or_say, save

COLORS = ["#3a87c8", "#d1662b", "#4c9a52", "#a56cc1", "#b8860b", "#c8517e", "#2a9d9d"]
COLORS += ["#7f7f3f", "#8a6d5c", "#5b4fc0", "#6b8fa8", "#a83232"]
MARKERS = "os^DvPX*h<>p"
DASHES = ["solid", (0, (5, 2)), (0, (1, 1.5))]
FIRST = ["lethe-plus", "lethe"]  # in the first colours, on top of the others


def measured(rows: list[dict]) -> tuple[str, dict, list[dict]]:
    """The name of what counts as right, the full cache's row, and those of the policies."""
    full, *pruned = [row for row in rows if "error" not in row]
    right = "solved" if "solved" in full else "exact"
    return right, full, pruned


def protection(protect: bool) -> str:
    """The heading for prompts that are protected, or not."""
    return "prompt protected" if protect else "prompt free"


def tables(rows: list[dict]) -> str:
    """A table each for free and protected prompts: the share of right problems in %, with interval.

    rows: of one family, the full cache's first.
    """
    right, full, pruned = measured(rows)

    def percent(row: dict) -> str:
        mean, low, high = (f"{100 * value:.1f}" for value in row[right])
        return f"{mean} [{low}, {high}]"

    lines = []
    for protect in sorted({row["protect"] for row in pruned}):
        mine = [row for row in pruned if row["protect"] == protect]
        budgets = list(dict.fromkeys(row["budget"] for row in mine))
        # Policies differ by 2 % in what they hold; the heading names what the first one holds.
        heads = {r["budget"]: f"{r['budget']}: {r['held']:.0f} slots" for r in reversed(mine)}
        lines += [
            f"| {protection(protect)} | " + " | ".join(heads[budget] for budget in budgets) + " |"
        ]
        lines += ["|---" * (1 + len(budgets)) + "|"]
        for choice in dict.fromkeys(row["choice"] for row in mine):
            found = {row["budget"]: percent(row) for row in mine if row["choice"] == choice}
            lines += [f"| {choice} | " + " | ".join(found.get(b, "") for b in budgets) + " |"]
        lines += [f"| full: {full['held']:.0f} slots | {percent(full)}" + " |" * len(budgets), ""]
    return "\n".join(lines)


def draw(rows: list[dict], out: Path) -> None:
    """rows: of one family, as `run reason --json` writes them."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    right, full, pruned = measured(rows)
    others = sorted({row["choice"] for row in pruned} - {*FIRST})
    choices = [name for name in FIRST if any(row["choice"] == name for row in pruned)] + others
    protections = sorted({row["protect"] for row in pruned})
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(
            1, len(protections), figsize=(1 + 4 * len(protections), 3.6), sharey=True, squeeze=False
        )
        for axes, protect in zip(panels[0], protections, strict=True):
            axes.axhline(100 * full[right][0], color=INK, linewidth=1, label="full")
            axes.axhspan(*(100 * end for end in full[right][1:]), color=INK, alpha=0.15, lw=0)
            for index, choice in enumerate(choices):
                mine = [r for r in pruned if (r["choice"], r["protect"]) == (choice, protect)]
                mine.sort(key=lambda row: row["share"])
                axes.plot(
                    [100 * row["share"] for row in mine],
                    [100 * row[right][0] for row in mine],
                    color=COLORS[index % len(COLORS)],
                    marker=MARKERS[index % len(MARKERS)],
                    linestyle=DASHES[index % len(DASHES)],
                    linewidth=2.2 if choice in FIRST else 1.2,
                    markersize=5,
                    zorder=3 if choice in FIRST else 2,
                    label=choice,
                )
            title = f"{protection(protect)}, {full['problems']} problems"
            axes.set_title(title, loc="left", fontsize=10)
            axes.set_xlabel("slots held, % of the full cache's")
            axes.set_xlim(0, None)
            axes.grid(axis="y", color=INK, alpha=0.25, linewidth=0.6)
        panels[0][0].set_ylabel("solved, %" if right == "solved" else "whole chain right, %")
        panels[0][0].set_ylim(0, 102)
        panels[0][-1].legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
        save(figure, out)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("json", type=Path, help="what `run reason --json` wrote")
    parser.add_argument("svg", type=Path, nargs="?", default=ROOT / "docs" / "quality.svg",
        help="the picture to write (default: docs/quality.svg)")  # fmt: skip
    parser.add_argument("--family", help="one family of problems (default: all of them together)")
    args = parser.parse_args(argv)
    rows = json.loads(args.json.read_text(encoding="utf-8"))["rows"]
    family = args.family or rows[-1].get("family")
    mine = [row for row in rows if row.get("family") == family]
    if family is None or not any("share" in row for row in mine):
        print(
            f"{args.json} has no problems of {family}; write some with run reason --json",
            file=sys.stderr,
        )
        return 2
    print(tables(mine))
    return draw_or_say(draw, mine, args.svg)


if __name__ == "__main__":
    sys.exit(main())
