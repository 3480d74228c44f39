"""lethe-mini: a reference engine for Lethe, KV-cache pruning for reasoning (arXiv 2511.06029)."""

from .engine import Engine
from .errors import CheckpointWarning, UserError
from .generation.sampling import Sampling
from .generation.stats import Generated, Result, Stats
from .policies import (
    H2O,
    RKV,
    TOVA,
    FullKV,
    Lethe,
    LethePlus,
    PyramidKV,
    RandomKV,
    Recall,
    SnapKV,
    StreamingLLM,
)
from .policy import Policy, Pruner

__all__ = [
    "H2O",
    "RKV",
    "TOVA",
    "CheckpointWarning",
    "Engine",
    "FullKV",
    "Generated",
    "Lethe",
    "LethePlus",
    "Policy",
    "Pruner",
    "PyramidKV",
    "RandomKV",
    "Recall",
    "Result",
    "Sampling",
    "SnapKV",
    "Stats",
    "StreamingLLM",
    "UserError",
]
