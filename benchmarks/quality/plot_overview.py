"""The picture at the top of docs/QUALITY.md, drawn from the tables of that page.

    python -m benchmarks.quality.plot_overview [docs/QUALITY.md] [docs/overview.svg]

One panel for puzzles (more is better), one each for a model's own reasoning and for prose (less is
better), against the budget. Texts show the Kullback-Leibler divergence from the full cache, which
is steadier than nats. Needs matplotlib: pip install 'lethe-mini[plot]'.
"""

import argparse
import re
import sys
from pathlib import Path

from benchmarks import ROOT
from benchmarks.common.plots import INK, STYLE, draw_or_say, save

# Their colours, markers and dashes. Random eviction is what a policy has to beat.
LINES = {
    "random": (INK, "", "dashed"),
    "recall": ("#3a87c8", "o", "solid"),
    "lethe-plus": ("#d1662b", "s", "solid"),
    "lethe": ("#4c9a52", "^", (0, (5, 2))),
    "lethe-hoyer": ("#a56cc1", "v", (0, (1, 1.5))),
}
# Heading of a section, words before its table, and what the panel shows.
PANELS = {
    "walks, whole chain right, %": ("Accuracy at a budget", "prompt protected"),
    "own reasoning, KL from full": ("Own chains", "KL"),
    "prose, KL from full": ("Prose", "KL"),
}


def rows(page: str, heading: str, words: str) -> list[list[str]]:
    """The first table under a heading whose first line has the words: its cells, head included."""
    section = re.split(rf"^## {heading}$", page, flags=re.MULTILINE)[1].partition("\n## ")[0]
    for table in re.findall(r"(?:^\|.*\n)+", section, re.MULTILINE):
        lines = [
            [cell.strip() for cell in line.strip("|").split("|")] for line in table.split("\n")
        ]
        if any(words in cell for cell in lines[0]):
            return [lines[0], *lines[2:-1]]
    raise ValueError(f"no table of {words!r} under {heading!r}")


def number(cell: str) -> float:
    """What stands before the interval: 0.042 [0.028, 0.056] is 0.042."""
    return float(cell.partition("[")[0])


def curves(page: str) -> dict[str, dict[str, dict[float, float]]]:
    """panel -> policy -> {budget in %: figure}. In a table a budget is a column, or in a row."""
    found: dict = {}
    for title, (heading, words) in PANELS.items():
        head, *body = rows(page, heading, words)
        found[title] = panel = {}
        for cells in body:
            if cells[0] not in LINES:
                continue
            curve = panel.setdefault(cells[0], {})
            if words == "KL":  # a figure of a row
                curve[float(cells[1].rstrip("%"))] = number(cells[head.index(words)])
            else:
                for column, cell in zip(head[1:], cells[1:], strict=True):
                    curve[float(column.partition("%")[0])] = number(cell)
    return found


def draw(panels: dict, out: Path) -> None:
    """panels: see `curves`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, len(panels), figsize=(11, 3.2))
        for one, (title, panel) in zip(axes, panels.items(), strict=True):
            for name, (color, marker, dashes) in LINES.items():
                if name in panel:
                    points = sorted(panel[name].items())
                    one.plot(*zip(*points, strict=True), color=color, marker=marker, label=name,
                             linestyle=dashes, markersize=5, linewidth=1.8)  # fmt: skip
            one.set_title(title, loc="left", fontsize=10)
            one.set_xlabel("budget, % of the text")
            one.set_xscale("log")
            one.set_xlim(4.5, 56)
            one.set_xticks([5, 10, 25, 50], ["5", "10", "25", "50"])
            if "KL" in title:
                one.set_yscale("log")
            one.minorticks_off()
            one.grid(axis="y", color=INK, alpha=0.25, linewidth=0.6)
        axes[0].set_ylim(0, 102)
        axes[-1].legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
        figure.tight_layout()
        save(figure, out)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add, docs = parser.add_argument, ROOT / "docs"
    add("page", type=Path, nargs="?", default=docs / "QUALITY.md", help="default: docs/QUALITY.md")
    add("svg", type=Path, nargs="?", default=docs / "overview.svg",
        help="the picture to write (default: docs/overview.svg)")  # fmt: skip
    args = parser.parse_args(argv)
    return draw_or_say(draw, curves(args.page.read_text(encoding="utf-8")), args.svg)


if __name__ == "__main__":
    sys.exit(main())
