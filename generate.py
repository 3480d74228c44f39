"""python generate.py --lethe: a model writes with its KV cache pruned (lethe_mini/app/cli.py)."""

import sys

from lethe_mini.app.cli import main

if __name__ == "__main__":
    sys.exit(main())
