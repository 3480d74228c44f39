"""What a benchmark ran on. At import this needs the standard library alone."""

import os
import platform
import re
import subprocess
from pathlib import Path

from benchmarks import ROOT


def processor() -> str:
    """The model of the CPU."""
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


def memory_bytes() -> int:
    """The machine's memory; 0 where the system does not say."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 0


def available_bytes() -> int:
    """Memory that the machine can still give to processes; 0 where the system does not say."""
    return _kilobytes(Path("/proc/meminfo"), "MemAvailable")


def resident_bytes() -> int:
    """Memory that this process has now; 0 where the system does not say."""
    return _kilobytes(Path("/proc/self/status"), "VmRSS")


def resident_peak_bytes() -> int:
    """The most memory that this process has had; 0 where the system does not say."""
    return _kilobytes(Path("/proc/self/status"), "VmHWM")


def _kilobytes(file: Path, key: str) -> int:
    """A size of a file of `key: N kB` lines, in bytes."""
    try:
        found = re.search(key + r":\s+(\d+)", file.read_text())
    except OSError:
        found = None
    return int(found[1]) * 1024 if found else 0


def commit() -> str:
    """The repository's commit, with `+` where files have changed since; empty without git."""

    def git(*args: str) -> str:
        argv = ["git", "-C", str(ROOT), *args]
        return subprocess.run(argv, capture_output=True, text=True).stdout.strip()

    try:
        changed = "+" if git("status", "--porcelain") else ""
        return git("rev-parse", "--short", "HEAD") + changed
    except OSError:
        return ""


def hardware(threads: int | None = None, gpu: str | None = None) -> str:
    """One line: CPU, cores, threads, memory, GPU, versions.

    threads: of the process that computes (default: this one's); gpu: its name, empty for none
    (default: the one that PyTorch sees).
    """
    import torch

    if gpu is None:
        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    threads = threads or torch.get_num_threads()
    facts = [processor(), f"{os.cpu_count()} cores", f"{threads} threads"]
    if memory := memory_bytes():
        facts.append(f"{memory / 1e9:.0f} GB")
    if gpu:
        facts.append(gpu)
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    return f"{', '.join(facts)}; {versions}"
