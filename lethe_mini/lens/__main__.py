"""The command that turns a trace into a page.

python -m lethe_mini.lens TRACE.json -o FILE.html [--compare OTHER.json]
"""

import argparse
import sys
from pathlib import Path

from ..errors import UserError
from .page import write_page
from .trace import Trace


def main(argv: list[str] | None = None) -> int:
    about = "Write a page that shows a trace: one HTML file, which needs no network."
    parser = argparse.ArgumentParser(prog="python -m lethe_mini.lens", description=about)
    parser.add_argument("trace", type=Path, help="a file that --trace wrote")
    parser.add_argument("-o", "--output", type=Path, required=True, help="the HTML file to write")
    parser.add_argument(
        "--compare", type=Path, help="a second trace, of the same prompt, to show beside it"
    )
    args = parser.parse_args(argv)
    try:
        paths = [args.trace] if args.compare is None else [args.trace, args.compare]
        write_page([Trace.read(path) for path in paths], args.output)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
