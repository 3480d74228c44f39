"""The walls between rooms: who may import what, no cycle, and an evening that stays an evening."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lethe_mini"
# The reading path, in its order.
EVENING = ["config", "rope", "model", "attention", "cache", "policy", "engine"]
TOOLS = ["kernels", "options", "errors", "peers"]  # beside it
ROOMS = {  # room or module: what it may import of the package, beside itself
    "errors": [],
    "kernels": [],
    "peers": [],
    "config": [],
    "rope": [],
    "options": ["errors", "kernels"],
    "jsonlines": ["errors"],
    "cache": ["rope", "kernels", "peers"],
    "attention": ["kernels"],
    "experts": ["config", "kernels"],
    "model": ["config", "rope", "attention", "cache", "experts", "kernels"],
    "policy": ["cache", "kernels", "options", "errors", "peers"],
    "engine": ["cache", "policy", "model", "kernels", "generation"],
    "policies": [*EVENING, *TOOLS],
    "parallel": ["*"],
    "checkpoint": ["config", "model", "errors"],
    "generation": ["cache", "kernels", "errors"],
    "reasoner": [],
    "lens": ["errors"],
    "integrations": ["attention", "cache", "errors", "generation", "kernels", "policy", "rope"],
    "app": ["*"],
    "sizing": ["*"],
    "": ["*"],  # lethe_mini/__init__.py
}
# Inside a function, so only where it is needed: the engine loads a model by name.
LATE = {"engine": ["checkpoint", "parallel"]}


def modules():
    """(dotted name less the package's own, syntax tree) of every module."""
    for file in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(file.relative_to(PACKAGE).with_suffix("").parts)
        yield name.removesuffix("__init__").strip("."), ast.parse(file.read_text(encoding="utf-8"))


def imports(name, tree):
    """(dotted name of a module of this package, is it imported at the top?)"""
    top = set(map(id, tree.body))
    folder = name.split(".")
    is_package = (PACKAGE / Path(*filter(None, folder)) / "__init__.py").exists()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names if alias.name.startswith("lethe_mini")]
            found = [one.removeprefix("lethe_mini").strip(".") for one in found]
        elif isinstance(node, ast.ImportFrom) and node.level:
            up = node.level - is_package
            base = folder[: len(folder) - up] if name else []
            target = ".".join([*base, *([node.module] if node.module else [])])
            found = [target] if node.module else [f"{target}.{a.name}" for a in node.names]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lethe_mini"):
            found = [node.module.removeprefix("lethe_mini").strip(".")]
        else:
            continue
        for one in found:
            yield one.strip("."), id(node) in top


MODULES = dict(modules())


@pytest.mark.parametrize("name", MODULES)
def test_a_module_imports_only_what_its_room_may(name):
    room = name.split(".")[0]
    assert room in ROOMS, f"{name} is in no room of this table"
    may = [room, *ROOMS[room]]
    for target, top in imports(name, MODULES[name]):
        allowed = may if top else [*may, *LATE.get(room, [])]
        assert "*" in may or target.split(".")[0] in allowed, f"{name} imports {target}"


def test_the_table_names_what_is_there():
    """No room of it has gone, and it grants nothing that nobody takes."""
    assert set(ROOMS) == {name.split(".")[0] for name in MODULES}
    taken = {room: set() for room in ROOMS}
    for name, tree in MODULES.items():
        taken[name.split(".")[0]] |= {target.split(".")[0] for target, _ in imports(name, tree)}
    for room, may in ROOMS.items():
        if may == ["*"] or room == "policies":
            continue
        assert set(may) <= taken[room], f"{room} need not import {set(may) - taken[room]}"


def test_no_cycle():
    """Of modules that import one another when they are loaded."""
    ahead = {
        name: {target for target, top in imports(name, tree) if top and target in MODULES}
        for name, tree in MODULES.items()
    }
    ahead = {name: targets - {name} for name, targets in ahead.items()}
    while ahead:
        free = [name for name, targets in ahead.items() if not targets & ahead.keys()]
        assert free, f"a cycle among {sorted(ahead)}"
        for name in free:
            del ahead[name]


def test_the_evening_stays_an_evening():
    """At most 1,000 lines by `wc -l`."""
    files = [PACKAGE / f"{name}.py" for name in EVENING] + [ROOT / "generate.py"]
    assert sum(file.read_text(encoding="utf-8").count("\n") for file in files) <= 1000


def test_the_papers_file_names_nothing_of_ours():
    """policy.py holds the paper and what all policies share; LethePlus and its ideas are elsewhere.
    What attention and cache do for its sake alone is named as that, where it stands."""
    options = ["even_share", "cap", "lag", "distinct", "alike", "per_head", "value_norm", "pyramid"]
    words = set(re.findall(r"\w+", (PACKAGE / "policy.py").read_text(encoding="utf-8").lower()))
    assert not words & {*options, "distinct_ratio", "letheplus", "lethe_plus", "granularity"}
    for file in ("attention.py", "cache.py", "kernels.py"):
        text = (PACKAGE / file).read_text(encoding="utf-8")
        assert "lag" not in text or "for LethePlus alone" in text or "For LethePlus alone" in text


def test_benchmarks_and_tests_find_the_package_without_surgery():
    """They are run from the repository's root, or installed; nothing changes sys.path."""
    for folder in ("benchmarks", "tests", "examples", "lethe_mini"):
        for file in (ROOT / folder).rglob("*.py"):
            if file != Path(__file__):
                assert "sys.path." not in file.read_text(encoding="utf-8"), file
