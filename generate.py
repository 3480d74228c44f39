"""python generate.py --lethe: a model writes with its KV cache pruned (lethe_mini/cli.py)."""

import sys

from lethe_mini.cli import main

if __name__ == "__main__":
    sys.exit(main())
