"""Processes that measure one system each, and who used the processors while they did."""

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from benchmarks import ROOT

MODULE = "benchmarks.speed.decode_worker"


class WorkerError(Exception):
    """A worker died or does not answer; one line says which and why."""


# -- one process per system ------------------------------------------------------------------------


class Worker:
    """A process that measures one system. label, policy: what the table calls them."""

    def __init__(self, label: str, policy: str, kind: str, settings: dict, python=sys.executable):
        self.label, self.policy, self.kind = label, policy, kind
        self.settings, self.python = settings, python
        self.facts: dict = {}
        self.process = None
        self.gone: str | None = None  # why it cannot be used any more

    @property
    def name(self) -> str:
        return f"{self.label} {self.policy}".strip()

    def start(self) -> None:
        """Starts the process and loads the system. A failure is noted in `gone`."""
        threads = str(self.settings["threads"])
        env = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
        self.errors = tempfile.TemporaryFile(mode="w+")  # noqa: SIM115 (closed with the worker)
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.errors}
        argv = [str(self.python), "-m", MODULE, self.kind]
        try:
            # `benchmarks` is installed nowhere; from the root any interpreter finds it.
            self.process = subprocess.Popen(argv, cwd=ROOT, env=env, text=True, **pipes)
        except OSError as error:
            self.gone = f"cannot start {self.python}: {error}"
            self.errors.close()
            return
        self.lines: queue.Queue = queue.Queue()
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()
        try:
            self.facts = self.ask("load", settings=self.settings)
        except WorkerError:
            return  # `ask` has noted it
        if "error" in self.facts:
            self.gone = self.facts.pop("error")

    def _read(self) -> None:
        for line in self.process.stdout:
            self.lines.put(line)
        self.lines.put(None)

    def ask(self, request: str, **options) -> dict:
        """The worker's answer. Raises WorkerError when none comes."""
        if self.gone is not None:
            raise WorkerError(self.gone)
        limit = self.settings["timeout"]
        try:
            self.process.stdin.write(json.dumps({"do": request, **options}) + "\n")
            self.process.stdin.flush()
            line = self.lines.get(timeout=limit)
        except OSError:
            line = None
        except queue.Empty:
            self.process.kill()
            self._lost(f"no answer to `{request}` in {limit:.0f} s")
        if line is None:
            code = self.process.wait()
            how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
            hint = ", perhaps because memory ran out" if code == -9 else ""
            self._lost(f"died in `{request}` ({how}{hint}){self._last_words()}")
        return json.loads(line)

    def _lost(self, why: str) -> None:
        self.gone = why
        raise WorkerError(why)

    def _last_words(self) -> str:
        self.errors.seek(0)
        lines = self.errors.read().strip().splitlines()
        return f": {lines[-1][:200]}" if lines else ""

    def cpu_seconds(self) -> float:
        """Processor time that the worker has used; 0 where the system does not say."""
        try:
            stat = Path(f"/proc/{self.process.pid}/stat").read_text()
        except (OSError, AttributeError):
            return 0.0
        after = stat.rpartition(")")[2].split()
        return (int(after[11]) + int(after[12])) / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        if self.process is None:
            return
        with contextlib.suppress(OSError):
            self.process.stdin.close()  # the worker ends with its input
        try:
            self.process.wait(timeout=2)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.reader.join(timeout=2)
        self.process.stdout.close()
        self.errors.close()
        self.process = None


def busy_seconds() -> float:
    """Processor time that the whole machine has used; 0 where the system does not say."""
    try:
        fields = [int(n) for n in Path("/proc/stat").read_text().split("\n")[0].split()[1:9]]
    except OSError:
        return 0.0
    user, nice, system, _, _, irq, softirq, steal = fields
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


class Load:
    """Who used the processors during a worker's turn, beside that worker."""

    def __init__(self, cores: int):
        self.cores = cores
        self.idle_workers, self.others, self.wall = 0.0, 0.0, 0.0

    @contextlib.contextmanager
    def turn(self, worker: Worker, workers: list[Worker]):
        mine, rest = worker.cpu_seconds(), sum(w.cpu_seconds() for w in workers if w is not worker)
        busy, start = busy_seconds(), time.perf_counter()
        yield
        self.wall += time.perf_counter() - start
        idle = sum(w.cpu_seconds() for w in workers if w is not worker) - rest
        self.idle_workers += idle
        self.others += busy_seconds() - busy - (worker.cpu_seconds() - mine) - idle

    def shares(self) -> dict:
        """What idle workers and other programs used of all processor time during turns."""
        whole = max(self.wall * self.cores, 1e-9)
        shares = {"idle_workers": self.idle_workers, "others": self.others}
        return {name: max(0.0, seconds / whole) for name, seconds in shares.items()}
