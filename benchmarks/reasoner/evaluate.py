"""How many unseen problems the reasoner solves with the full cache: exact answers, greedy decoding.

    python -m benchmarks.reasoner.evaluate             # 500 of each family, the shipped model
    python -m benchmarks.reasoner.evaluate --beyond    # longer than any it was trained on

Problems follow from a seed that training never uses. A line of JSON per problem goes to --output;
the command goes on where that file stopped.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.common.results import wilson
from benchmarks.quality.chains import draw
from lethe_mini import Engine
from lethe_mini.reasoner.problems import BEYOND, FAMILIES, TRAINED, check


def evaluate(engine: Engine, family: str, problems: list, batch: int, quiet: bool = False):
    """Yields (number, generated, solved) as batches of like size end; problems: [(number, one)]."""
    ordered = sorted(problems, key=lambda pair: pair[1].size)
    with tqdm(total=len(ordered), desc=family, disable=quiet) as bar:
        for first in range(0, len(ordered), batch):
            part = ordered[first : first + batch]
            limits = [len(engine.text.encode(one.chain)) + 50 for _, one in part]
            result = engine.generate([one.prompt for _, one in part], max_new_tokens=limits)
            if any(made.finish_reason == "interrupted" for made in result.sequences):
                raise KeyboardInterrupt  # which the engine answers with what there is
            for (number, one), made in zip(part, result.sequences, strict=True):
                yield number, one, made, made.finish_reason == "stop" and check(one, made.text)
            bar.update(len(part))


def table(lines: list[dict]) -> str:
    """Accuracy per family, and the lengths that it is over, as Markdown."""
    rows = ["| family | solved | of | accuracy, 95 % interval | prompt tokens | chain tokens |"]
    rows += ["|---|---|---|---|---|---|"]
    for family in FAMILIES:
        mine = [line for line in lines if line["family"] == family]
        if not mine:
            continue
        solved = sum(line["solved"] for line in mine)
        low, high = wilson(solved, len(mine))
        spans = []
        for key in ("prompt_tokens", "chain_tokens"):
            values = sorted(line[key] for line in mine)
            spans.append(f"{values[0]} to {values[-1]}, median {values[len(values) // 2]}")
        share = f"{solved / len(mine):.1%} ({low:.1%} to {high:.1%})"
        rows.append(f"| `{family}` | {solved} | {len(mine)} | {share} | {' | '.join(spans)} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--model", default="reasoner", help="default: %(default)s, the shipped one")
    add("--families", nargs="+", default=list(FAMILIES), choices=list(FAMILIES))
    add("--problems", type=int, default=500, help="of each family (default: %(default)s)")
    add("--beyond", action="store_true", help="sizes beyond those trained on")
    add("--seed", default="evaluate", help="default: %(default)s")
    add("--batch", type=int, default=50, help="problems at once (default: %(default)s)")
    add("--output", type=Path, help="a line of JSON per problem; goes on if it is there")
    args = parser.parse_args()
    engine = Engine.from_pretrained(args.model)
    lines = []
    if args.output is not None and args.output.is_file():
        lines = [json.loads(line) for line in args.output.read_text(encoding="utf-8").splitlines()]
    done = {(line["family"], line["number"]) for line in lines}
    started = time.process_time()
    for family in args.families:
        sizes = (BEYOND if args.beyond else TRAINED)[family]
        numbers = [n for n in range(args.problems) if (family, n) not in done]
        drawn = [(number, draw(family, number, args.seed, sizes)) for number in numbers]
        for number, one, made, solved in evaluate(engine, family, drawn, args.batch):
            line = {
                "family": family,
                "number": number,
                "size": one.size,
                "prompt_tokens": made.prompt_tokens,
                "chain_tokens": len(engine.text.encode(one.chain)) + 1,  # and the end
                "generated_tokens": made.generated_tokens,
                "solved": solved,
                "same_chain": made.text == one.chain,
            }
            lines.append(line)
            if args.output is not None:
                with args.output.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
    print(table(lines))
    seconds = time.process_time() - started
    print(f"\n{seconds:.0f} processor seconds; PyTorch {torch.__version__}, {engine.dtype}")


if __name__ == "__main__":
    main()
