"""The look of all plots, and how a plotting command ends.

Greys and mid tones read on a light page and on a dark one. Lines differ in dash and marker, not in
colour alone. Plots need matplotlib, which is imported only where one is drawn.
"""

import sys
from collections.abc import Callable
from pathlib import Path

INK = "#808080"  # about as far from white as from black
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "lethe-mini",  # the same figures give the same file
    "font.size": 10,
    "font.family": "sans-serif",
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def save(figure, out: Path) -> None:
    """Writes the figure, with room for what stands beside the axes, and closes it."""
    import matplotlib.pyplot as plt

    out.parent.mkdir(parents=True, exist_ok=True)
    # No date, so that equal figures give an equal file.
    figure.savefig(out, bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)


def draw_or_say(draw: Callable[..., None], facts, out: Path) -> int:
    """Draws, and prints where the picture is or why there is none. -> the exit code."""
    try:
        draw(facts, out)
    except ImportError:
        print("plots need matplotlib: pip install 'lethe-mini[plot]'", file=sys.stderr)
        return 2
    print(out)
    return 0
