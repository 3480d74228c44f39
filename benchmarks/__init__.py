"""Measurements of lethe-mini. README.md says which command makes which table.

Run commands from the root of the repository: python -m benchmarks.speed.decode
"""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]  # of the repository
