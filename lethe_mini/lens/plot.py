"""Plots of a trace for papers and slides, as PNG and SVG files. Extra `plot`: matplotlib.

    python -m lethe_mini.lens.plot TRACE.json -o NAME [--tokens 0,40,123]

The command writes three plots, if the trace has what they show: NAME-hoyer (Hoyer by layer and
round, the paper's Figure 1), NAME-held (tokens held by layer and step) and NAME-scores (the scores
of some tokens, round by round).
"""

import argparse
import sys
from itertools import cycle
from pathlib import Path

import numpy as np

from ..errors import UserError, writing
from .replay import replay, scored
from .trace import Trace

COLUMNS = 400  # NAME-held shows at most so many steps


def hoyer_by_layer(data: dict, sequence: int) -> tuple[list[int], np.ndarray]:
    """Of the rounds that have Hoyer values: the tokens seen, and the values (layers, rounds)."""
    rounds = [record for record in data["sequences"][sequence]["rounds"] if "hoyer" in record]
    return [record["seen"] for record in rounds], np.array([r["hoyer"] for r in rounds], float).T


def held_by_layer(data: dict, sequence: int) -> tuple[np.ndarray, np.ndarray]:
    """Steps, in tokens seen, and the tokens held (layers, steps), a mean over a layer's heads."""
    read = data["sequences"][sequence]["read"]
    steps = np.unique(np.linspace(0, read, COLUMNS + 1).round().astype(int))
    seen, kept = [0], [[0.0] * data["layers"]]
    for record, _, held in replay(data, sequence):
        seen.append(record["seen"])
        kept.append([np.mean([len(head) for head in layer]) for layer in held])
    last = np.searchsorted(seen, steps, side="right") - 1
    return steps, (np.array(kept)[last] + (steps - np.array(seen)[last])[:, None]).T


def score_of_tokens(data: dict, sequence: int, tokens: list[int]) -> dict[int, list[tuple]]:
    """token -> (tokens seen, its score summed over the layers that hold it), round by round."""
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
    """name -> Figure, for every plot that the trace has the data of. Raises UserError without
    matplotlib, and for a sequence or a token that the trace does not have."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("plots need matplotlib: pip install 'lethe-mini[plot]'") from None
    data, count = trace.data, len(trace.data["sequences"])
    if not 0 <= sequence < count:
        raise UserError(f"--sequence should be from 1 to {count}: the trace has {count} sequences")
    one = data["sequences"][sequence]
    tokens = _some_tokens(one) if tokens is None else tokens
    if any(not 0 <= token < one["read"] for token in tokens):
        raise UserError(f"--tokens should be from 0 to {one['read'] - 1}, not {tokens}")
    made = {}

    def axes(name: str, ylabel: str):
        made[name] = Figure(figsize=(6.4, 3.4), layout="constrained")
        ax = made[name].subplots()
        ax.set(xlabel="tokens seen", ylabel=ylabel)
        return ax

    seen, values = hoyer_by_layer(data, sequence)
    if seen:
        _draw_hoyer(axes("hoyer", "layer"), seen, values)
    steps, held = held_by_layer(data, sequence)
    if len(steps) > 1:
        _draw_held(axes("held", "layer"), steps, held)
    courses = score_of_tokens(data, sequence, tokens)
    courses = {token: course for token, course in courses.items() if course}
    if courses:
        _draw_scores(axes("scores", "score, all layers that hold it"), courses, one["pieces"])
    if not made:
        raise UserError("the trace has nothing to plot: no token of this sequence was read")
    return made


def _some_tokens(one: dict) -> list[int]:
    """The first token, the last one of the prompt, and four of those that the model wrote."""
    first, last = one["prompt_tokens"], one["read"]
    tokens = {0, first - 1, *(first + (last - first) * i // 6 for i in range(1, 5))}
    return sorted(token for token in tokens if token < last)


def _draw_hoyer(ax, seen: list[int], values: np.ndarray) -> None:
    middles = (np.array(seen[1:]) + np.array(seen[:-1])) / 2
    edges = np.concatenate(([seen[0] - 0.5], middles, [seen[-1] + 0.5]))
    grid = np.arange(len(values) + 1) - 0.5
    mesh = ax.pcolormesh(edges, grid, values, vmin=0, vmax=1, rasterized=True)
    ax.invert_yaxis()
    ax.figure.colorbar(mesh, label="Hoyer: 0 spread out, 1 concentrated")


def _draw_held(ax, steps: np.ndarray, held: np.ndarray) -> None:
    ends = (steps[0], steps[-1], len(held) - 0.5, -0.5)
    image = ax.imshow(held, aspect="auto", extent=ends, interpolation="nearest", cmap="cividis")
    ax.figure.colorbar(image, label="tokens held")


def _draw_scores(ax, courses: dict[int, list[tuple]], pieces: list[str]) -> None:
    for (token, course), marker in zip(courses.items(), cycle("osv^Dx+*<>"), strict=False):
        # In ASCII, since fonts lack letters; and a dollar would start a formula.
        piece = pieces[token].strip(" ").encode("unicode_escape").decode()
        label = f"{token}: {piece[:16]}".replace("$", r"\$")
        ax.plot(*zip(*course, strict=True), marker=marker, markersize=4, label=label)
    if all(score > 0 for course in courses.values() for _, score in course):
        ax.set_yscale("log")
    ax.legend(title="token", fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))


def save(made: dict, name: Path) -> list[Path]:
    """Writes every figure as a PNG and an SVG file; equal traces give equal bytes."""
    from matplotlib import rc_context

    paths = []
    for figure, drawing in made.items():
        for kind, options in (("png", {"dpi": 150}), ("svg", {"metadata": {"Date": None}})):
            paths.append(name.with_name(f"{name.name}-{figure}.{kind}"))
            with writing(paths[-1]), rc_context({"svg.hashsalt": "lethe-mini"}):
                drawing.savefig(paths[-1], **options)
    return paths


def _tokens(text: str | None) -> list[int] | None:
    """The positions of --tokens; None where it is not given."""
    if text is None:
        return None
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise UserError(f"--tokens should be numbers like 0,40,123, not {text}") from None


def main(argv: list[str] | None = None) -> int:
    about = (
        "Draw a trace as PNG and SVG files: the Hoyer value of each layer, the tokens that each "
        "layer holds, and the scores of some tokens."
    )
    parser = argparse.ArgumentParser(prog="python -m lethe_mini.lens.plot", description=about)
    parser.add_argument("trace", type=Path, help="a file that --trace wrote")
    add = parser.add_argument
    add("-o", "--output", type=Path, required=True, metavar="NAME",
        help="the files' name; they are NAME-hoyer.png, NAME-held.png, ...")  # fmt: skip
    add("--tokens", metavar="P,P,...",
        help="the positions of the tokens whose scores to draw (default: some)")  # fmt: skip
    add("--sequence", type=int, default=1, metavar="N",
        help="which sequence of the trace (default: %(default)s)")  # fmt: skip
    args = parser.parse_args(argv)
    try:
        made = figures(Trace.read(args.trace), args.sequence - 1, _tokens(args.tokens))
        for path in save(made, args.output):
            print(path)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
