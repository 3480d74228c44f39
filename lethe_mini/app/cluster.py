"""Many prompts over many machines: Ray Data, whose workers are an Engine each.

The prompts go out in blocks. A worker runs a block as one call of `generate`, which keeps its batch
full, and sends every text as soon as it ends. The command itself writes them, into one new part of
the output folder, so no machine but this one needs that folder. If a worker dies, Ray starts
another and runs the block again; the texts come out the same, and those that are there already are
dropped. A second run reads all parts and writes what they lack into the next one.
"""

import importlib.util
import json
import logging
import os
import socket
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from queue import SimpleQueue

import torch
from tqdm import tqdm

from ..checkpoint.config import read_config
from ..checkpoint.load import check_dtype, pick_device, pick_dtype, resolve
from ..checkpoint.text import Text
from ..engine import Engine
from ..errors import PromptError, UserError, one_line, writing
from ..generation.sampling import Sampling
from ..jsonlines import Appender
from ..model import Transformer
from ..policy import Policy
from .batch import announce, find_missing, read_done
from .prompts import Prompt

BATCHES = 8  # of a worker, in a block: fewer leave the batch half empty more often
NO_RAY = "--ray needs Ray; pip install 'lethe-mini[cluster]'"
SMALL = 10_000_000  # parameters up to which a second thread costs more than it gains
Serve = Callable[[Engine, list, Callable[[object], None]], None]


def without_weights(model: str, device: str, dtype: str, revision: str | None) -> Engine:
    """What encodes prompts as the workers' engines do, and has their dtype; it can generate
    nothing. Raises UserError."""
    check_dtype(dtype)
    folder = resolve(model, revision)
    with torch.device("meta"):
        transformer = Transformer(read_config(folder))
    transformer.to(pick_dtype(dtype, device_of_workers(device), folder))
    return Engine(transformer, Text(folder), model)


def device_of_workers(name: str) -> str:
    """This machine's best for "auto"; else as named, for the workers may have what it lacks."""
    return pick_device("auto") if name == "auto" else name


def is_small(engine: Engine) -> bool:
    return sum(p.numel() for p in engine.model.parameters()) <= SMALL


class Worker:
    """One process of the cluster. load: gives its Engine; serve(engine, jobs, put): runs jobs and
    puts what is to be sent, which JSON should hold; threads: of the CPU."""

    def __init__(self, load: Callable[[], Engine], serve: Serve, threads: int):
        torch.set_num_threads(threads)
        self.serve, self.engine, self.error = serve, None, ""
        try:
            self.engine = load()
        except UserError as error:  # an actor that cannot be made is made again, for ever
            self.error = str(error)

    def __call__(self, block: dict) -> Iterator[dict]:
        """A block {"job": (n,)} of JSON -> a block {"sent": (1,)} of each thing put, at once."""
        jobs, sent = [json.loads(job) for job in block["job"]], SimpleQueue()

        def work() -> None:
            try:
                if self.error:
                    raise UserError(self.error)
                self.serve(self.engine, jobs, lambda one: sent.put({"sent": one}))
            except UserError as error:
                sent.put({"error": str(error)})
            finally:
                sent.put(None)

        with ThreadPoolExecutor(1) as pool:
            working = pool.submit(work)
            for one in iter(sent.get, None):
                yield {"sent": [json.dumps(one)]}
            working.result()


@dataclass(frozen=True)
class Cluster:
    """address: local (the cores or GPUs of this machine), auto (a cluster that was started here) or
    a cluster's. threads: CPU threads of a worker; None: one for a small model, else a machine's.
    """

    address: str
    load: partial  # without arguments gives an Engine
    device: str
    threads: int | None
    small: bool

    @classmethod
    def of(
        cls,
        address: str,
        engine: Engine,
        load: Callable[..., Engine],
        device: str,
        revision: str | None,
        compile: bool,
        threads: int | None = None,
    ) -> "Cluster":
        """Workers with the weights of an engine of `without_weights`, in its dtype. load:
        Engine.from_pretrained, or what takes the same."""
        device = device_of_workers(device)
        dtype = str(engine.dtype).removeprefix("torch.")
        load = partial(load, engine.name, device, dtype, revision, compile)
        return cls(address, load, device, threads, is_small(engine))

    def run(self, serve: Serve, jobs: list, batch: int | None, policy: Policy) -> Iterator:
        """What `serve` puts for these jobs, in any order, and again where a worker died. batch:
        jobs that a worker runs at a time; None: all of a block. policy: what `serve` brings of the
        user's own code. Raises UserError, one of a worker's, too."""
        ray = _ray()
        self._knock()
        try:
            with _silent():
                ray.init(self.address, include_dashboard=False, log_to_driver=False,
                         logging_level=logging.ERROR)  # fmt: skip
        except (ConnectionError, RuntimeError, OSError) as error:
            raise UserError(f"no Ray cluster at {self.address}: {one_line(error)}") from None
        # Code of the user's goes along, since no other machine has it.
        homes = {
            name.partition(".")[0] for name in (type(policy).__module__, self.load.func.__module__)
        }
        own = [sys.modules[name] for name in homes - {"lethe_mini", "__main__"}]
        for module in own:
            ray.cloudpickle.register_pickle_by_value(module)
        try:
            workers, options = self._workers(ray)
            size = -(-len(jobs) // workers)
            size = min(size, BATCHES * batch) if batch else size
            rows = [{"job": json.dumps(job)} for job in jobs]
            data = ray.data.from_items(rows, override_num_blocks=-(-len(jobs) // size))
            arguments = {"load": self.load, "serve": serve, "threads": options.pop("threads")}
            sent = data.map_batches(
                Worker,
                batch_size=None,
                fn_constructor_kwargs=arguments,
                concurrency=min(workers, -(-len(jobs) // size)),
                **options,
            )
            for row in sent.iter_rows():
                one = json.loads(row["sent"])
                if "error" in one:
                    raise UserError(one["error"])
                yield one["sent"]
        except ray.exceptions.RayTaskError:  # a fault of ours, with its traceback
            raise
        except ray.exceptions.RayError as error:
            raise UserError(f"the Ray cluster failed: {one_line(error)}") from None
        finally:
            for module in own:
                ray.cloudpickle.unregister_pickle_by_value(module)
            with _silent():  # of what a run was stopped in the middle of
                ray.shutdown()

    def _knock(self) -> None:
        """Raises UserError where nobody listens: Ray itself would try for minutes."""
        if self.address in ("local", "auto"):
            return
        host, _, port = self.address.rpartition(":")
        if not host or not port.isdecimal() or "/" in host:
            raise UserError(f"--ray should be local, auto or HOST:PORT, not {self.address!r}")
        try:
            socket.create_connection((host, int(port)), timeout=10).close()
        except (OSError, OverflowError) as error:
            raise UserError(f"no Ray cluster at {self.address}: {error}") from None

    def _workers(self, ray) -> tuple[int, dict]:
        """How many the cluster has room for, and what each takes."""
        machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        cores = [int(one.get("CPU", 0)) for one in machines]
        if self.device == "cuda":
            gpus = sum(int(one.get("GPU", 0)) for one in machines)
            if not gpus:
                raise UserError(f"the cluster at {self.address} has no GPU; use --device cpu")
            return gpus, {"num_gpus": 1, "num_cpus": 0, "threads": self.threads or 1}
        threads = self.threads or (1 if self.small else min(n for n in cores if n))
        workers = sum(n // threads for n in cores)
        if not workers:
            raise UserError(f"no machine at {self.address} has {threads} cores; lower --threads")
        return workers, {"num_cpus": threads, "threads": threads}


@contextmanager
def _silent() -> Iterator[None]:
    """Within it, nothing of this process reaches standard error: Ray's core has no other switch."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _ray():
    """Ray, told to keep to itself. Raises UserError if it is not installed."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    try:
        import ray
        import ray.data
    except ImportError:
        raise UserError(NO_RAY) from None
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    context.target_max_block_size = 1  # a text is sent when it ends, and waits for no other
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    return ray


# -- a file of prompts -----------------------------------------------------------------------------


def check_folder(path: Path) -> None:
    """Raises UserError where no part can be written, or Ray is not installed; leaves the folder as
    it is."""
    if importlib.util.find_spec("ray") is None:
        raise UserError(NO_RAY)
    if path.exists() and not path.is_dir():
        raise UserError(f"{path} is a file; with --ray, --output is a folder")
    existed = path.exists()
    with writing(path):
        path.mkdir(exist_ok=True)
        probe = path / ".lethe-mini.tmp"
        probe.touch()
        probe.unlink()
        if not existed:
            path.rmdir()


def read_parts(
    folder: Path, prompts: list[Prompt], num_samples: int, runs: dict
) -> tuple[set[tuple], set[tuple]]:
    """As `read_done`, of all parts in the folder."""
    done: set[tuple] = set()
    told: set[tuple] = set()
    for part in sorted(folder.glob("part-*.jsonl")):
        texts, errors = read_done(part, prompts, num_samples, runs)
        if twice := done & texts:
            id, sample = min(twice, key=str)
            where = f"{part}: sample {sample} of {id!r} is in another part, too"
            raise UserError(f"{where}; remove one of the two parts")
        done |= texts
        told |= errors
    return done, told


def next_part(folder: Path) -> Path:
    """The name behind those that are there, in the folder, which is made if need be."""
    with writing(folder):
        folder.mkdir(exist_ok=True)
    numbers = [part.stem.removeprefix("part-") for part in folder.glob("part-*.jsonl")]
    last = max((int(number) for number in numbers if number.isdecimal()), default=-1)
    return folder / f"part-{last + 1:05}.jsonl"


def serve(
    engine: Engine,
    jobs: list,
    put: Callable[[object], None],
    policy: Policy,
    sampling: Sampling,
    num_samples: int,
    **options,
) -> None:
    """jobs: [number, token ids, most new tokens] each -> puts [number, sample, the text] each, or
    [number, None, what is wrong with a prompt], which ends the run. Options: generate's."""
    options |= {"num_samples": num_samples}

    def on_finish(index: int, one) -> None:
        put([jobs[index // num_samples][0], index % num_samples, asdict(one)])

    numbers, ids, limits = zip(*jobs, strict=True)
    try:
        engine.generate(ids, policy, limits, sampling, on_finish=on_finish, **options)
    except PromptError as error:
        put([numbers[error.number], None, error.reason])


def run_cluster(
    cluster: Cluster,
    engine: Engine,
    prompts: list[Prompt],
    policy: Policy,
    folder: Path,
    max_new_tokens: int,
    sampling: Sampling,
    num_samples: int = 1,
    quiet: bool = False,
    skip_invalid: bool = False,
    **options,
) -> None:
    """As `run_batch`, into a new part of the folder. engine: of `without_weights`."""
    missing = find_missing(
        engine, prompts, policy, partial(read_parts, folder), max_new_tokens, sampling,
        num_samples, skip_invalid, options,
    )  # fmt: skip
    if not missing:
        return
    if not quiet:
        announce(missing, folder)
    left, seen, tokens = missing.prompts, set(), 0
    jobs = [
        [number, ids, missing.limits[prompt.id]]
        for number, (prompt, ids) in enumerate(zip(left, missing.encoded, strict=True))
    ]
    with (
        ExitStack() as opened,
        tqdm(total=missing.count, unit="seq", disable=quiet or None) as bar,
    ):

        @cache
        def part() -> Appender:  # not before there is something to write
            return opened.enter_context(Appender(next_part(folder)))

        for line in missing.errors():
            part().write(line)
        if not left:
            return
        facts = {"policy": policy, "sampling": sampling, "num_samples": num_samples}
        serving, batch = partial(serve, **facts, **options), options["batch_size"]
        together = None if batch is None else max(1, batch // num_samples)
        for number, sample, one in cluster.run(serving, jobs, together, policy):
            if sample is None:
                raise UserError(left[number].told(one))
            line = missing.line(left[number], sample, one)
            if line is None or (number, sample) in seen:  # was there, or its worker died
                continue
            seen.add((number, sample))
            part().write(line)
            tokens += one["generated_tokens"]
            rate = tokens / max(1e-9, bar.format_dict["elapsed"] or 0)
            bar.set_postfix_str(f"{rate:.1f} tokens/s", refresh=False)
            bar.update()
    if lost := missing.count - len(seen):
        raise UserError(f"{lost} texts did not come back; the same command writes them")
