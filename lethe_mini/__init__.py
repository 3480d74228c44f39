"""lethe-mini: a reference engine for Lethe, KV-cache pruning for reasoning (arXiv 2511.06029)."""

from .engine import Engine
from .errors import UserError
from .generation.stats import Generated, Result, Stats
from .policy import FullKV, Lethe, Policy, Pruner

__all__ = [
    "Engine",
    "FullKV",
    "Generated",
    "Lethe",
    "Policy",
    "Pruner",
    "Result",
    "Stats",
    "UserError",
]
