"""The registry of policies, and how to find one that is not ours.

Each file here is one policy, its paper's choice of tokens behind the protocol of policy.py. Sinks,
recent tokens, prompt protection, budget and interval are common code, so that a comparison differs
in the choice alone. Defaults are those of the reference code; where that differs from its paper, or
has a slip, a line says what is done here.

A new policy is one file: here, listed in POLICIES, or anywhere else, named `path/to/mine.py:Mine`.
"""

import importlib.util
import sys
from pathlib import Path

from ..errors import UserError
from ..policy import FullKV, Lethe, Policy
from .h2o import H2O
from .lethe_plus import LethePlus
from .pyramidkv import PyramidKV
from .random_kv import RandomKV
from .recall import Recall
from .rkv import RKV
from .snapkv import SnapKV
from .streaming import StreamingLLM
from .tova import TOVA

__all__ = [
    "H2O", "POLICIES", "RKV", "TOVA", "FullKV", "Lethe", "LethePlus", "Policy", "PyramidKV",
    "RandomKV", "Recall", "SnapKV", "StreamingLLM", "find_policy",
]  # fmt: skip

ALL = (FullKV, Lethe, LethePlus, Recall, StreamingLLM, H2O, TOVA, SnapKV, PyramidKV, RKV, RandomKV)
POLICIES: dict[str, type[Policy]] = {policy.name: policy for policy in ALL}


def find_policy(name: str) -> type[Policy]:
    """The class of a policy: a name of POLICIES, or `path/to/file.py:Class`. Raises UserError."""
    if name in POLICIES:
        return POLICIES[name]
    path, colon, kind = name.rpartition(":")
    if not colon or not path.endswith(".py"):
        raise UserError(
            f"no policy {name!r}; there are {', '.join(POLICIES)}, or path/to/file.py:Class"
        )
    if not Path(path).is_file():
        raise UserError(f"no policy {name!r}: there is no file {path}")
    module = _load(Path(path).resolve())
    found = getattr(module, kind, None)
    if not (isinstance(found, type) and issubclass(found, Policy)):
        raise UserError(
            f"{path} has no policy {kind!r}; a policy is a subclass of Pruner or Policy"
        )
    return found


def _load(file: Path):
    """The module in a file, run once. Raises UserError for a file that Python cannot run."""
    name = f"lethe_mini_policy_{abs(hash(str(file)))}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # it can raise anything that Python can
        del sys.modules[name]
        raise UserError(f"cannot load {file}: {type(error).__name__}: {error}") from None
    return module
