"""How many unseen problems the reasoner solves with the full cache, decoding greedily.

    python -m benchmarks.reasoner.evaluate             # 500 of each family, the shipped model
    python -m benchmarks.reasoner.evaluate --beyond    # longer problems than it was trained on

Problems come from a seed that training never uses. --output writes a line of JSON per problem; a
second run with the same file does what is missing.
"""

import argparse
import json
import time
from pathlib import Path

from tqdm import tqdm

from benchmarks.common.commands import user_errors
from benchmarks.common.hardware import hardware
from benchmarks.common.results import wilson
from benchmarks.quality.chains import draw
from lethe_mini import Engine, Sampling
from lethe_mini.jsonlines import Appender, read_lines
from lethe_mini.reasoner.problems import BEYOND, FAMILIES, TRAINED, solved

HEAD = b'{"family": '  # how every line begins
KEPT = ("family", "number", "solved", "prompt_tokens", "chain_tokens")  # of a line that is read


def evaluate(engine: Engine, family: str, problems: list, batch: int, quiet: bool = False):
    """Yields (number, problem, generated, right answer?) batch by batch, by size.

    problems: [(number, problem)].
    """
    ordered = sorted(problems, key=lambda pair: pair[1].size)
    with tqdm(total=len(ordered), desc=family, disable=quiet) as bar:
        for first in range(0, len(ordered), batch):
            part = ordered[first : first + batch]
            limits = [len(engine.text.encode(one.chain)) + 50 for _, one in part]
            prompts = [one.prompt for _, one in part]
            result = engine.generate(prompts, max_new_tokens=limits, sampling=Sampling())
            if any(made.finish_reason == "interrupted" for made in result.sequences):
                raise KeyboardInterrupt  # the engine has caught it and returned a part
            for (number, one), made in zip(part, result.sequences, strict=True):
                yield number, one, made, made.finish_reason == "stop" and solved(one, made.text)
            bar.update(len(part))


def table(lines: list[dict]) -> str:
    """A Markdown table: accuracy per family, with the lengths of its problems."""
    rows = ["| family | solved | of | accuracy, 95 % interval | prompt tokens | chain tokens |"]
    rows += ["|---|---|---|---|---|---|"]
    for family in FAMILIES:
        mine = [line for line in lines if line["family"] == family]
        if not mine:
            continue
        right = sum(line["solved"] for line in mine)
        low, high = wilson(right, len(mine))
        spans = []
        for key in ("prompt_tokens", "chain_tokens"):
            values = sorted(line[key] for line in mine)
            spans.append(f"{values[0]} to {values[-1]}, median {values[len(values) // 2]}")
        share = f"{right / len(mine):.1%} ({low:.1%} to {high:.1%})"
        rows.append(f"| `{family}` | {right} | {len(mine)} | {share} | {' | '.join(spans)} |")
    return "\n".join(rows)


def read_done(path: Path | None) -> list[dict]:
    """What an output file has already. Raises UserError for a file of something else."""
    lines: list[dict] = []

    def accept(number: int, line) -> None:
        lines.append({name: line[name] for name in KEPT})

    if path is not None:
        read_lines(path, HEAD, accept)
    return lines


def run(args: argparse.Namespace) -> None:
    """Solves what the output file lacks, and prints the table."""
    lines = read_done(args.output)
    engine = Engine.from_pretrained(args.model)
    started = time.process_time()
    done = {(line["family"], line["number"]) for line in lines}
    for family in args.families:
        sizes = (BEYOND if args.beyond else TRAINED)[family]
        numbers = [n for n in range(args.problems) if (family, n) not in done]
        drawn = [(number, draw(family, number, args.seed, sizes)) for number in numbers]
        for number, one, made, right in evaluate(engine, family, drawn, args.batch):
            lines.append(
                {
                    "family": family,
                    "number": number,
                    "size": one.size,
                    "prompt_tokens": made.prompt_tokens,
                    "chain_tokens": len(engine.text.encode(one.chain)) + 1,  # and the end
                    "generated_tokens": made.generated_tokens,
                    "solved": right,
                    "same_chain": made.text == one.chain,
                }
            )
            if args.output is not None:
                with Appender(args.output) as file:
                    file.write(json.dumps(lines[-1]))
    seconds = time.process_time() - started
    print(f"{table(lines)}\n\n{seconds:.0f} processor seconds, {engine.dtype}; {hardware()}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--model", default="reasoner", help="default: %(default)s, the shipped one")
    add("--families", nargs="+", default=list(FAMILIES), choices=list(FAMILIES),
        help="default: all")  # fmt: skip
    add("--problems", type=int, default=500, help="of each family (default: %(default)s)")
    add("--beyond", action="store_true", help="longer problems than it was trained on")
    add("--seed", default="evaluate", help="of the problems (default: %(default)s)")
    add("--batch", type=int, default=50, help="problems at once (default: %(default)s)")
    add("--output", type=Path, help="JSON Lines file to write to, and to continue from")
    args = parser.parse_args(argv)
    with user_errors():
        run(args)


if __name__ == "__main__":
    main()
