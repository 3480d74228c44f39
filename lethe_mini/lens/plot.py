"""Plots of a trace for papers and slides, as PNG and SVG (extra `plot`: matplotlib).

    python -m lethe_mini.plot TRACE.json -o NAME [--tokens 0,40,123]

writes NAME-hoyer (Hoyer by layer and step, the paper's Figure 1), NAME-held (tokens held by layer
and step) and NAME-scores (the scores of chosen tokens as they decay), as far as the trace has them.
"""

import argparse
import sys
from itertools import cycle
from pathlib import Path

import numpy as np

from ..errors import UserError
from .replay import replay, scored
from .trace import Trace

COLUMNS = 400  # steps at which NAME-held looks, at most


def hoyer_by_layer(data: dict, sequence: int) -> tuple[list[int], np.ndarray]:
    """Tokens seen at each round that knows Hoyer, and (layers, rounds) of it."""
    rounds = [record for record in data["sequences"][sequence]["rounds"] if "hoyer" in record]
    return [record["seen"] for record in rounds], np.array([r["hoyer"] for r in rounds], float).T


def held_by_layer(data: dict, sequence: int) -> tuple[np.ndarray, np.ndarray]:
    """Steps in tokens seen, and (layers, steps) of tokens held, the mean over a layer's heads."""
    read = data["sequences"][sequence]["read"]
    steps = np.unique(np.linspace(0, read, COLUMNS + 1).round().astype(int))
    seen, kept = [0], [[0.0] * data["layers"]]
    for record, _, held in replay(data, sequence):
        seen.append(record["seen"])
        kept.append([np.mean([len(head) for head in layer]) for layer in held])
    last = np.searchsorted(seen, steps, side="right") - 1
    return steps, (np.array(kept)[last] + (steps - np.array(seen)[last])[:, None]).T


def score_of_tokens(data: dict, sequence: int, tokens: list[int]) -> dict[int, list[tuple]]:
    """token -> (tokens seen, its score over all layers that hold it), round by round."""
    courses: dict[int, list[tuple]] = {token: [] for token in tokens}
    for record, before, _ in replay(data, sequence):
        if "scores" not in record:
            continue
        layers = [scored(record, layer, heads) for layer, heads in enumerate(before)]
        for token, course in courses.items():
            found = [scores[positions == token] for positions, scores in layers]
            found = np.concatenate(found)
            if len(found):
                course.append((record["seen"], float(np.nansum(found))))
    return courses


def figures(trace: Trace, sequence: int = 0, tokens: list[int] | None = None) -> dict:
    """name -> matplotlib's Figure of what the trace has. Raises UserError without matplotlib, or
    for a sequence or a token that is not there."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("plots need matplotlib: pip install 'lethe-mini[plot]'") from None
    data = trace.data
    if not 0 <= sequence < len(data["sequences"]):
        raise UserError(f"the trace has {len(data['sequences'])} sequences, none {sequence + 1}")
    one = data["sequences"][sequence]
    if tokens is None:  # the first, the prompt's last, and some of the text
        first, last = one["prompt_tokens"], one["read"]
        tokens = sorted({0, first - 1, *(first + (last - first) * i // 6 for i in range(1, 5))})
        tokens = [token for token in tokens if token < last]
    if any(not 0 <= token < one["read"] for token in tokens):
        raise UserError(f"--tokens should be from 0 to {one['read'] - 1}, not {tokens}")
    made = {}

    def axes(name: str, xlabel: str, ylabel: str):
        made[name] = Figure(figsize=(6.4, 3.4), layout="constrained")
        ax = made[name].subplots()
        ax.set(xlabel=xlabel, ylabel=ylabel)
        return ax

    seen, values = hoyer_by_layer(data, sequence)
    if seen:
        ax = axes("hoyer", "tokens seen", "layer")
        middles = (np.array(seen[1:]) + seen[:-1]) / 2 if len(seen) > 1 else np.array([])
        edges = np.concatenate(([seen[0] - 0.5], middles, [seen[-1] + 0.5]))
        grid = np.arange(data["layers"] + 1) - 0.5
        mesh = ax.pcolormesh(edges, grid, values, vmin=0, vmax=1, rasterized=True)
        ax.invert_yaxis()
        ax.figure.colorbar(mesh, label="Hoyer: 0 spread out, 1 concentrated")
    steps, held = held_by_layer(data, sequence)
    if len(steps) > 1:
        ax = axes("held", "tokens seen", "layer")
        ends = (steps[0], steps[-1], data["layers"] - 0.5, -0.5)
        image = ax.imshow(held, aspect="auto", extent=ends, interpolation="nearest", cmap="cividis")
        ax.figure.colorbar(image, label="tokens held")
    courses = {k: v for k, v in score_of_tokens(data, sequence, tokens).items() if v}
    if courses:
        ax = axes("scores", "tokens seen", "score, all layers that hold it")
        for (token, course), marker in zip(courses.items(), cycle("osv^Dx+*<>"), strict=False):
            # In ASCII: fonts lack letters, and a dollar would start a formula.
            piece = one["pieces"][token].strip(" ").encode("unicode_escape").decode()
            label = f"{token}: {piece[:16]}".replace("$", r"\$")
            ax.plot(*zip(*course, strict=True), marker=marker, markersize=4, label=label)
        if all(score > 0 for course in courses.values() for _, score in course):
            ax.set_yscale("log")
        ax.legend(title="token", fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    if not made:
        raise UserError("the trace has nothing to plot: no token of this sequence was read")
    return made


def save(made: dict, name: Path) -> list[Path]:
    """Writes every figure as NAME-figure.png and .svg; the same trace gives the same bytes."""
    from matplotlib import rc_context

    paths = []
    for figure, drawing in made.items():
        for kind, options in (("png", {"dpi": 150}), ("svg", {"metadata": {"Date": None}})):
            paths.append(name.with_name(f"{name.name}-{figure}.{kind}"))
            try:
                with rc_context({"svg.hashsalt": "lethe-mini"}):
                    drawing.savefig(paths[-1], **options)
            except OSError as error:
                raise UserError(f"cannot write {paths[-1]}: {error.strerror}") from None
    return paths


def main(argv: list[str] | None = None) -> int:
    about = "Plots of a trace, as PNG and SVG."
    parser = argparse.ArgumentParser(prog="python -m lethe_mini.plot", description=about)
    parser.add_argument("trace", type=Path, help="what --trace wrote")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="NAME")
    parser.add_argument("--tokens", help="positions whose scores to draw, with commas between")
    parser.add_argument("--sequence", type=int, default=1, help="of several (default: %(default)s)")
    args = parser.parse_args(argv)
    try:
        try:
            tokens = None if args.tokens is None else [int(x) for x in args.tokens.split(",")]
        except ValueError:
            raise UserError(
                f"--tokens should be numbers like 0,40,123, not {args.tokens}"
            ) from None
        for path in save(figures(Trace.read(args.trace), args.sequence - 1, tokens), args.output):
            print(path)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
