"""One model on several devices, a process each, over torch.distributed (started by torchrun).

- *tensor*: every layer is divided by whole key/value heads with their query heads, and by columns
  of its MLP or of each of its experts; the vocabulary by rows. What the devices make of a layer is
  added up twice: behind attention and behind the MLP.
- *layers*: each device holds a run of layers, and hands the hidden states on.

All processes do the same: each has the engine, its part of the model and of the cache, and sees the
same logits, so it chooses the same tokens. A round asks the `peers` of a cache (peers.py) for what
other devices hold, so that budgets and common choices are the same everywhere.

On the command line the first process alone reads prompts and writes text; the others follow it.
"""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import cache
from itertools import accumulate

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from .cache import KVCache
from .checkpoint.config import read_config
from .checkpoint.load import check_dtype, load_model, pick_device, pick_dtype, resolve
from .checkpoint.text import Text
from .config import ModelConfig
from .engine import Engine
from .errors import UserError, one_line
from .experts import Experts
from .kernels import Linear, product
from .model import Transformer
from .peers import Alone
from .policies import Recall
from .policy import Policy

MODES = ("tensor", "layers")
LOST = "another process of this model has ended, so this one ends, too"
WAIT = timedelta(seconds=60)  # for a word of another process' end


class PeerLost(UserError):
    """Another process of the model has ended, so this one cannot go on."""

    code = 1


@contextmanager
def speaking() -> Iterator[None]:
    """Around what the processes say to each other. Raises PeerLost where one does not answer."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise PeerLost(LOST) from error


@dataclass(frozen=True)
class Devices:
    """The processes of one model, numbered from 0. What one does here, all must do."""

    rank: int  # this one's number
    count: int
    device: str
    group: dist.ProcessGroup
    store: dist.Store  # what the processes share beside, by name

    @speaking()
    def summed(self, x: Tensor) -> Tensor:
        """x, added up over all devices; 16-bit numbers in float32."""
        total = x.float() if x.element_size() == 2 else x + 0
        dist.all_reduce(total, group=self.group)
        return total.to(x.dtype)

    @speaking()
    def joined(self, x: Tensor, sizes: list[int], dim: int) -> Tensor:
        """Every device's x behind one another; sizes: of each, along `dim`."""
        x = x.movedim(dim, 0)
        mine = x.new_zeros(max(sizes), *x.shape[1:])
        mine[: len(x)] = x
        parts = [torch.empty_like(mine) for _ in sizes]
        dist.all_gather(parts, mine, group=self.group)
        pairs = zip(parts, sizes, strict=True)
        return torch.cat([part[:size] for part, size in pairs]).movedim(0, dim)

    @speaking()
    def from_rank(self, x: Tensor, rank: int) -> Tensor:
        """x of that device, on every device."""
        x = x.clone(memory_format=torch.contiguous_format)
        dist.broadcast(x, rank, group=self.group)
        return x

    @speaking()
    def send(self, x: Tensor) -> None:
        """Hands x to the next device."""
        dist.send(x.contiguous(), self.rank + 1, group=self.group)

    @speaking()
    def receive(self, x: Tensor) -> Tensor:
        """Fills x with what the device before sends."""
        dist.recv(x, self.rank - 1, group=self.group)
        return x

    @speaking()
    def agree(self, told: object) -> list:
        """What every process says, in their order."""
        answers = [None] * self.count
        dist.all_gather_object(answers, told, group=self.group)
        return answers

    def any(self, here: bool) -> bool:
        """Is it so in any process?"""
        return self.summed(torch.tensor([int(here)], device=self.device)).item() > 0

    @speaking()
    def told(self, what: object = None) -> object:
        """What the first process tells: `what`."""
        answer = [what]
        dist.broadcast_object_list(answer, 0, group=self.group)
        return answer[0]

    def first_to_end(self, code: int) -> tuple[bool, int]:
        """Is this process the first to end? And the exit code of the one that was."""
        try:
            self.store.set_timeout(WAIT)
            if self.store.add("lethe-mini/ends", 1) == 1:
                self.store.set("lethe-mini/code", str(code))
                return True, code
            return False, int(self.store.get("lethe-mini/code"))
        except RuntimeError:  # it was with a process that has ended
            return True, code


def shares(total: int, count: int) -> list[int]:
    """`total` things over `count` devices, in whole ones: 8 over 3 is 3, 3, 2."""
    return [total // count + (rank < total % count) for rank in range(count)]


def runs(costs: list[int], count: int) -> list[range]:
    """Which layers each device holds: `count` runs, the costliest of which costs least."""
    before = [0, *accumulate(costs)]

    @cache
    def best(first: int, n: int) -> tuple[int, tuple[int, ...]]:
        """What the costliest of n runs from layer `first` on costs, and where they end."""
        if n == 1:
            return before[-1] - before[first], (len(costs),)
        found = []
        for last in range(first + 1, len(costs) - n + 2):
            rest, ends = best(last, n - 1)
            found.append((max(before[last] - before[first], rest), (last, *ends)))
        return min(found)

    ends = best(0, count)[1]
    return [range(*pair) for pair in zip((0, *ends[:-1]), ends, strict=True)]


def by_heads(config: ModelConfig, count: int, rank: int) -> ModelConfig:
    """The sizes of what a device holds of every layer, by whole key/value heads and by columns.
    Raises UserError for more devices than heads."""
    heads, queries = config.num_key_value_heads, config.num_attention_heads
    if count > heads:
        raise UserError(
            f"the model's {heads} key/value heads do not go over {count} devices; take {heads} or "
            "fewer, or --parallel layers"
        )
    mine = shares(heads, count)[rank]
    return replace(
        config,
        num_attention_heads=mine * (queries // heads),
        num_key_value_heads=mine,
        intermediate_size=shares(config.intermediate_size, count)[rank],
        moe_intermediate_size=shares(config.moe_intermediate_size, count)[rank],
    )


def by_layers(
    config: ModelConfig, layers: list[int], embedding: int, head: int, count: int
) -> list[range]:
    """Which layers each device holds. layers, embedding, head: how many weights they have. With its
    weights a layer counts its cache of one text of the longest; the embedding goes with the first
    layer, the head with the last. Raises UserError for more devices than layers."""
    if count > len(layers):
        raise UserError(
            f"the model's {len(layers)} layers do not go over {count} devices; take fewer"
        )
    cache = 2 * config.num_key_value_heads * config.head_dim * config.max_position_embeddings
    costs = [weights + cache for weights in layers]
    costs[0] += embedding
    costs[-1] += head
    return runs(costs, count)


# --- The model's parts -----------------------------------------------------------------------


class Summed(Linear):
    """A map whose columns are divided."""

    def __init__(self, devices: Devices, size: int, out: int, bias: bool):
        super().__init__(size, out, bias=bias)
        self.devices = devices

    def forward(self, x: Tensor) -> Tensor:
        y = self.devices.summed(product(x, self.weight))
        return y if self.bias is None else y + self.bias


class SummedExperts(Experts):
    """Experts whose columns are divided."""

    def __init__(self, devices: Devices, config: ModelConfig):
        super().__init__(config)
        self.devices = devices

    def forward(self, x: Tensor) -> Tensor:
        return self.devices.summed(super().forward(x))


class DividedEmbedding(nn.Embedding):
    """The vocabulary's rows from `first` on."""

    def __init__(self, devices: Devices, first: int, rows: int, size: int):
        super().__init__(rows, size)
        self.devices, self.first = devices, first

    def forward(self, tokens: Tensor) -> Tensor:
        rows = tokens - self.first
        here = (rows >= 0) & (rows < len(self.weight))
        found = F.embedding(rows.where(here, 0), self.weight)
        return self.devices.summed(found.where(here[..., None], 0))


class DividedHead(Linear):
    """The logits of the vocabulary's rows here, and of all others."""

    def __init__(self, devices: Devices, size: int, sizes: list[int]):
        super().__init__(size, sizes[devices.rank], bias=False)
        self.devices, self.sizes = devices, sizes

    def forward(self, x: Tensor) -> Tensor:
        return self.devices.joined(super().forward(x), self.sizes, -1)


class Received(nn.Module):
    """In place of the embedding: hidden states from the device before."""

    def __init__(self, devices: Devices, size: int, dtype: torch.dtype):
        super().__init__()
        self.devices = devices
        self.weight = torch.empty(0, size, dtype=dtype, device=devices.device)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.devices.receive(self.weight.new_empty(*tokens.shape, self.weight.shape[1]))


class Elsewhere(nn.Module):
    """In place of a layer that another device holds. The first behind a run sends its states on."""

    def __init__(self, devices: Devices, sends: bool):
        super().__init__()
        self.devices, self.sends = devices, sends

    def forward(self, x, cos, sin, positions, store=None, slots=None, lag=0):
        if self.sends:
            self.devices.send(x)
        return x, x.new_empty(len(x), 0, x.shape[1], 2 * cos.shape[-1])


class LastHead(Linear):
    """The head, on the device that holds the last layers: all others get its logits."""

    def __init__(self, devices: Devices, config: ModelConfig):
        super().__init__(config.hidden_size, config.vocab_size, bias=False)
        self.devices = devices

    def forward(self, x: Tensor) -> Tensor:
        return self.devices.from_rank(super().forward(x).float(), self.devices.count - 1)


class ReceivedLogits(nn.Module):
    """In place of the head, on the other devices."""

    def __init__(self, devices: Devices, config: ModelConfig):
        super().__init__()
        self.devices, self.vocab = devices, config.vocab_size

    def forward(self, x: Tensor) -> Tensor:
        logits = torch.empty(*x.shape[:-1], self.vocab, device=x.device)
        return self.devices.from_rank(logits, self.devices.count - 1)


# --- How a model is divided ------------------------------------------------------------------


class ByHeads:
    """Each device holds some heads, columns and words. Raises UserError if they are too few."""

    def __init__(self, devices: Devices, config: ModelConfig, dtype: torch.dtype):
        self.devices, self.config = devices, config
        self.mine = by_heads(config, devices.count, devices.rank)
        self.heads = shares(config.num_key_value_heads, devices.count)

    def part(self, total: int) -> tuple[int, int]:
        """First and last of this device's part of so many things."""
        sizes, rank = shares(total, self.devices.count), self.devices.rank
        return sum(sizes[:rank]), sum(sizes[: rank + 1])

    def model(self) -> Transformer:
        """This device's part, without storage."""
        config, devices, mine = self.config, self.devices, self.mine
        model, hidden = Transformer(mine), config.hidden_size
        for block in model.layers:
            size = mine.num_attention_heads * config.head_dim
            block.self_attn.o_proj = Summed(devices, size, hidden, config.o_bias)
            if isinstance(block.mlp, Experts):
                block.mlp = SummedExperts(devices, mine)
            else:
                size = mine.intermediate_size
                block.mlp.down_proj = Summed(devices, size, hidden, config.mlp_bias)
        first, last = self.part(config.vocab_size)
        model.embed_tokens = DividedEmbedding(devices, first, last - first, hidden)
        model.lm_head = DividedHead(devices, hidden, shares(config.vocab_size, devices.count))
        if config.tie_word_embeddings:
            model.lm_head.weight = model.embed_tokens.weight
        return model

    def cut(self, name: str, shape: tuple[int, ...]) -> tuple[slice, ...]:
        """What this device holds of a tensor, by the hub's name, less `model.`."""
        owner, leaf = name.split(".")[-2:]
        if owner in ("o_proj", "down_proj"):  # columns; a bias is added behind the sum
            columns = [self.slice(owner, shape[1])] if leaf == "weight" else []
            return slice(None), *columns
        divided = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "embed_tokens", "lm_head")
        return (self.slice(owner, shape[0]) if owner in divided else slice(None),)

    def slice(self, owner: str, total: int) -> slice:
        """This device's part of so many rows or columns."""
        unit = 1
        if owner in ("q_proj", "k_proj", "v_proj", "o_proj"):  # whole heads, with their queries
            unit = total // self.config.num_key_value_heads
        first, last = self.part(total // unit)
        return slice(first * unit, last * unit)

    def equip(self, cache: KVCache) -> None:
        """Peers for a new cache, and for its layers."""
        cache.peers = HeadPeers(self.devices, self.heads)
        for layer in cache.layers:
            layer.peers = cache.peers


class ByLayers:
    """Each device holds a run of layers. Raises UserError if they are too few."""

    def __init__(self, devices: Devices, config: ModelConfig, dtype: torch.dtype):
        self.devices, self.config, self.dtype = devices, config, dtype
        with torch.device("meta"):
            model = Transformer(config)
        layers = [sum(p.numel() for p in block.parameters()) for block in model.layers]
        ends = model.embed_tokens.weight.numel(), model.lm_head.weight.numel()
        self.here = by_layers(config, layers, *ends, devices.count)[devices.rank]

    def model(self) -> Transformer:
        """This device's part, without storage."""
        config, devices, here = self.config, self.devices, self.here
        # One copy of a tied embedding on the first device, another on the last.
        model = Transformer(replace(config, tie_word_embeddings=False))
        model.config = config
        for index in set(range(config.num_hidden_layers)) - set(here):
            model.layers[index] = Elsewhere(devices, index == here.stop)
        if devices.rank > 0:
            model.embed_tokens = Received(devices, config.hidden_size, self.dtype)
        if devices.rank < devices.count - 1:
            model.norm, model.lm_head = nn.Identity(), ReceivedLogits(devices, config)
        else:
            model.lm_head = LastHead(devices, config)
        model.decode_layers = list(model.layers)
        return model

    def cut(self, name: str, shape: tuple[int, ...]) -> tuple[slice, ...]:
        """All of a tensor."""
        return (slice(None),)

    def equip(self, cache: KVCache) -> None:
        """Peers for a new cache. A layer that is elsewhere has no heads here, yet it counts what it
        holds."""
        cache.peers = LayerPeers(self.devices, self.here)
        for layer in cache.layers:
            if layer.index in self.here:
                continue
            layer.peers = Absent()
            layer.store = {name: tensor[:, :0] for name, tensor in layer.store.items()}
            layer.queries, layer.beacons = layer.queries[:, :0], layer.beacons[:, :0]


class HeadPeers(Alone):
    """Peers that hold other heads of the same layers."""

    def __init__(self, devices: Devices, sizes: list[int]):
        self.devices, self.sizes = devices, sizes
        self.first = sum(sizes[: devices.rank])

    def total(self, heads: int) -> int:
        return sum(self.sizes)

    def heads(self, x: Tensor) -> Tensor:
        x = x.expand(-1, self.sizes[self.devices.rank], *x.shape[2:])  # what is one for all heads
        return self.devices.joined(x, self.sizes, 1)

    def layers(self, x: Tensor) -> Tensor:
        return self.devices.from_rank(x, 0)


class LayerPeers(Alone):
    """Peers that hold other layers."""

    def __init__(self, devices: Devices, here: range):
        self.devices, self.range = devices, here

    def layers(self, x: Tensor) -> Tensor:
        there = torch.ones(x.shape[1], dtype=torch.bool, device=x.device)
        there[self.range.start : self.range.stop] = False
        x = x.masked_fill(there.view(1, -1, *[1] * (x.dim() - 2)), 0)
        return self.devices.summed(x)


class Absent(Alone):
    """Peers of a layer that another device holds: this one knows nothing of it."""

    here = False

    def heads(self, x: Tensor) -> Tensor:
        return x.new_zeros(len(x), 1, *x.shape[2:])


# --- The engine, and the processes -----------------------------------------------------------


class Presses:
    """Ctrl-C, noted while the processes must stay together."""

    count = 0

    def note(self, *_) -> None:
        self.count += 1

    @contextmanager
    def held_back(self) -> Iterator[None]:
        """Inside, Ctrl-C is noted and ends nothing."""
        try:
            before = signal.signal(signal.SIGINT, self.note)
        except ValueError:  # not the main thread
            before = None
        try:
            yield
        finally:
            if before is not None:
                signal.signal(signal.SIGINT, before)

    def taken(self) -> bool:
        """Has there been one since this was asked last?"""
        count, self.count = self.count, 0
        return count > 0


PRESSES = Presses()


class Divided(Engine):
    """An engine whose model lies on several devices. All processes call it alike; or the first
    leads, and the others `follow` it."""

    def __init__(self, model: Transformer, text, name: str, division):
        super().__init__(model, text, name)
        self.division, self.devices = division, division.devices
        self.leads = False
        self.halfway = False  # has an error ended a call that the others are still in?

    def new_cache(self, policy: Policy, positions: str = "absolute") -> KVCache:
        cache = super().new_cache(policy, positions)
        self.division.equip(cache)
        return cache

    def generate(
        self, prompts, policy=None, max_new_tokens=512, sampling=None, *, on_step=None, **options
    ):
        """Engine.generate, on all devices at once. Ctrl-C in one process ends the call in all.
        Raises UserError for what takes one device, and PeerLost."""
        if isinstance(policy, Recall):
            raise UserError("recall draws from all layers and heads at once; leave out --parallel")
        if options.get("trace") is not None:
            raise UserError("a trace is of all layers and heads; leave out --parallel")
        if self.leads:
            told = {k: v for k, v in options.items() if k not in ("on_token", "on_finish", "cache")}
            resumed = options.get("cache")
            fresh = None if resumed is None else not any(resumed.seen)
            self.devices.told((fresh, (prompts, max_new_tokens, sampling), told))

        def after_step(cache: KVCache) -> None:
            if self.devices.any(PRESSES.taken()):
                raise KeyboardInterrupt
            if on_step is not None:
                on_step(cache)

        self.halfway = True
        asked = (prompts, policy, max_new_tokens, sampling)
        try:
            with PRESSES.held_back():
                result = super().generate(*asked, on_step=after_step, **options)
        except UserError as error:  # the others have the same, unless it is that one is lost
            self.halfway = isinstance(error, PeerLost)
            raise
        self.halfway = False
        return result

    def follow(self, policy: Policy) -> int:
        """Does what the first process does, until it says the end. -> its exit code."""
        cache = None  # of a conversation
        while True:
            told = self.devices.told()
            if isinstance(told, int):
                return told
            fresh, (prompts, most, sampling), options = told
            if fresh:
                cache = self.new_cache(policy, options["positions"])
            try:
                resumed = None if fresh is None else cache
                self.generate(prompts, policy, most, sampling, cache=resumed, **options)
            except PeerLost:
                raise
            except UserError:  # the first has the same, and says so
                pass


def load_divided(
    model: str, device: str, dtype: str, revision: str | None, compile: bool, mode: str
) -> Divided:
    """This process' part of a model, and an engine for it. Raises UserError in all processes for
    what one of them cannot load."""
    if mode not in MODES:
        raise UserError(f"parallel should be {' or '.join(MODES)}, not {mode!r}")
    if compile:
        raise UserError("--compile is for one device; leave it out, or --parallel")
    check_dtype(dtype)
    devices = start(mode, device)
    local = int(os.environ.get("LOCAL_RANK", devices.rank))

    def together(step: Callable[[], object]) -> object:
        """A step of all processes. Raises what the first that fails raises, in all of them."""
        value, error = None, None
        try:
            value = step()
        except UserError as found:
            error = str(found)
        except (MemoryError, RuntimeError) as found:  # of one device alone
            error = f"process {devices.rank}: {one_line(found) or 'out of memory'}"
        answers = devices.agree((error, PRESSES.taken()))
        if any(pressed for _, pressed in answers):
            raise KeyboardInterrupt
        for error, _ in answers:
            if error is not None:
                raise UserError(error)
        return value

    def part() -> Divided:
        folder = resolve(model, revision)
        kind = pick_dtype(dtype, devices.device, folder)
        division = DIVISIONS[mode](devices, read_config(folder), kind)
        transformer = load_model(folder, devices.device, kind, division)
        return Divided(transformer, Text(folder), model, division)

    with PRESSES.held_back():
        # One process of each machine fetches what is not there.
        together(lambda: resolve(model, revision) if local == 0 else None)
        return together(part)


def start(mode: str, device: str) -> Devices:
    """The processes that torchrun started. Raises UserError if it did not."""
    if not {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= set(os.environ):
        raise UserError(
            f"--parallel {mode} takes several processes; start them with torchrun "
            "--nproc-per-node N generate.py ..."
        )
    kind = pick_device(device).partition(":")[0]
    if kind not in ("cpu", "cuda"):
        raise UserError(f"--parallel is for --device cpu or cuda, not {kind}")
    if kind == "cuda":
        device = pick_device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}")
        torch.cuda.set_device(device)
        os.environ.setdefault("LETHE_MINI_CAPTURE", "0")  # not tried: sums within a CUDA graph
    else:
        device = "cpu"
    if not dist.is_initialized():
        with speaking():
            store, rank, count = next(dist.rendezvous("env://"))
            backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
            dist.init_process_group(backend, store=store, rank=rank, world_size=count)
    mesh = init_device_mesh(kind, (dist.get_world_size(),), mesh_dim_names=(mode,))
    store = dist.distributed_c10d._get_default_store()
    return Devices(dist.get_rank(), dist.get_world_size(), device, mesh.get_group(), store)


def lead_or_follow(
    engine: Divided,
    policy: Policy,
    write: Callable[[], int],
    tell: Callable[[UserError], None],
    guard: AbstractContextManager,
) -> int:
    """The command, in every process: the first writes, the others follow it. -> the exit code.

    An error or Ctrl-C in one process ends them all. The first that ends tells why. guard: around
    both, what makes UserErrors of others.
    """

    def stop(*_) -> None:
        raise PeerLost(LOST)

    devices, engine.leads = engine.devices, engine.devices.rank == 0
    signal.signal(signal.SIGTERM, stop)  # by which torchrun ends the others
    try:
        with guard:
            if engine.leads:
                code = write()
                devices.told(code)
            else:
                with PRESSES.held_back():
                    code = engine.follow(policy)
        return code
    except BaseException as error:
        codes = {KeyboardInterrupt: 130, BrokenPipeError: 0}
        first, code = devices.first_to_end(getattr(error, "code", codes.get(type(error), 1)))
        if engine.leads and not engine.halfway:  # the others wait to be told
            devices.told(code)
        if not first:
            return code
        if not isinstance(error, UserError):
            raise
        tell(error)
        return code


def leave(code: int) -> None:
    """Ends a process of a divided model here and now. While Python ends by itself, the threads of
    PyTorch's processes may abort it."""
    if dist.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


DIVISIONS = {"tensor": ByHeads, "layers": ByLayers}
