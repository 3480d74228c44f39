"""Wheels of our own as the only ones that pip can find, and an empty cache."""

import hashlib
import os
import zipfile
from pathlib import Path


def write_wheel(store: Path, name: str, version: str, files: dict, needs: str = "") -> str:
    """A wheel in the folder; files: what it holds, as bytes. Returns its hash."""
    module, metadata = name.replace("-", "_"), f"Metadata-Version: 2.1\nName: {name}\n"
    path, info = store / f"{module}-{version}-py3-none-any.whl", f"{module}-{version}.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        for member, data in files.items():
            archive.writestr(member, data)
        archive.writestr(f"{info}/METADATA", f"{metadata}Version: {version}\n{needs}")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return hashlib.sha256(path.read_bytes()).hexdigest()


def only(store: Path, cache: Path, monkeypatch) -> None:
    """pip sees this folder and nothing else; fetched models go to `cache`."""
    for key in [key for key in os.environ if key.startswith("PIP_")]:
        monkeypatch.delenv(key)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(store))
    monkeypatch.setenv("LETHE_MINI_CACHE", str(cache))
