"""From a name to a model in memory: find the folder, check every tensor, fill every parameter once.

`resolve` turns `reasoner`, `demo`, a folder or a hub id into a folder. Of a hub repository it
fetches only safetensors, JSON and chat templates. `load_weights` first checks names, shapes and
dtypes from the headers, then reads tensor by tensor into the final dtype and device. So memory
holds one copy of the model, and no file stays open. Nothing is unpickled.
"""

import logging
import os
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from ..errors import UserError, warn
from ..model import Experts, Joined, Transformer
from .config import DTYPES, read_config, read_json

FETCHED = ["*.safetensors", "*.json", "*.jinja"]
# Folders hold other formats, all but chat templates; consolidated is a second copy of the weights.
NOT_FETCHED = ["*/*.safetensors", "*/*.json", "consolidated*"]
FLOATS = ("F64", "F32", "F16", "BF16")  # 8-bit floats need scales: they count as quantized
PORTION = 1 << 25
EMBEDDING, HEAD = "embed_tokens.weight", "lm_head.weight"
# Old checkpoints hold what RoPE is computed with, of each layer or of the model. It follows from
# config.json.
ROPE_BUFFER = re.compile(r"(.*\.)?rotary_emb\.(inv_freq|cos_cached|sin_cached)")
ADAPTERS = ("adapter_config.json", "adapter_model.safetensors")
NO_PICKLES = "pickled weights (.bin, .pt, .pth) are never read, so convert those to safetensors"


def resolve(model: str, revision: str | None = None) -> Path:
    """The folder of `reasoner` (it ships with the package), of `demo`, of a local checkpoint, or of
    a hub repository, fetched if need be."""
    folder = os.path.expanduser(model)  # os.path, unlike Path, takes any string
    if revision is not None and (model in ("reasoner", "demo") or os.path.exists(folder)):
        raise UserError(f"a revision is for models on the hub; {model!r} is local, so leave it out")
    if model == "reasoner":
        return Path(__file__).parents[1] / "reasoner"
    if model == "demo":
        from .demo import demo_folder

        return demo_folder()
    if os.path.isdir(folder):
        return Path(folder)
    if os.path.exists(folder):
        raise UserError(f"{model!r} is a file; give the folder that holds it and config.json")
    if not model or model[0] in "./~" or "\\" in model or model.count("/") > 1:
        raise UserError(f"no such folder: {model!r}; give a model folder or a hub id (name/name)")
    return _fetch(model, revision)


def _fetch(model: str, revision: str | None) -> Path:
    """The snapshot of a hub repository, or the cached one if the hub cannot be reached."""
    from huggingface_hub import errors, snapshot_download  # slow to import, often not needed

    def snapshot(**options) -> Path:
        with _quiet("huggingface_hub"):
            kwargs = {"revision": revision, "allow_patterns": FETCHED, **options}
            return Path(snapshot_download(model, ignore_patterns=NOT_FETCHED, **kwargs))

    try:
        return snapshot()
    except errors.HFValidationError:
        message = f"{model!r} is neither a folder nor a hub id; a hub id looks like name/name"
    except errors.RevisionNotFoundError:
        message = f"{model!r} has no revision {revision!r} on the hub; give a branch, tag or commit"
    except errors.GatedRepoError:
        message = f"{model!r} is gated; accept its terms on its hub page, then set HF_TOKEN"
    except errors.RepositoryNotFoundError:
        message = (
            f"there is no folder and no hub repository {model!r}; mend the name, or set HF_TOKEN "
            "if the repository is private"
        )
    except Exception as error:  # what "no network" raises differs between releases of the client
        try:
            return snapshot(local_files_only=True)
        except Exception:
            reason = " ".join(str(error.__cause__ or error).split()) or type(error).__name__
            message = (
                f"{model!r} could not be fetched from the hub and is not in the cache "
                f"({reason[:200]}); check the connection, or give a local folder"
            )
    raise UserError(message)


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Silences a logger's warnings. The UserError that follows says what matters of them."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def load(
    model: str,
    device: str = "auto",
    dtype: str = "auto",
    revision: str | None = None,
    compile: bool = False,
) -> tuple[Path, Transformer]:
    """The folder of a model (see `resolve`), and the model, ready to run. Raises UserError."""
    device = pick_device(device)
    check_dtype(dtype)
    folder = resolve(model, revision)
    transformer = load_model(folder, device, pick_dtype(dtype, device, folder))
    if compile:
        transformer.compile()
    return folder, transformer


def pick_device(name: str) -> str:
    """ "auto" is CUDA, else Apple's MPS, else the CPU. Raises UserError for what is not there."""
    have = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        return next((device for device, there in have.items() if there), "cpu")
    kind = name.partition(":")[0]
    if kind not in ("cpu", *have):
        raise UserError(f"device should be auto, cpu, cuda or mps, not {name!r}")
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError):  # PyTorch raises either
        raise UserError(f"this machine has no device {name!r}; use --device cpu or auto") from None
    return name


def check_dtype(name: str) -> None:
    """Raises UserError for what is no dtype here."""
    if name not in ("auto", *DTYPES):
        raise UserError(f"dtype should be auto, {', '.join(DTYPES)}, not {name!r}")


def pick_dtype(name: str, device: str, folder: Path) -> torch.dtype:
    """ "auto" is what the weights were saved in; but on a CPU float16, slow there, is float32."""
    if name == "auto":
        name = read_config(folder).dtype
        if device == "cpu" and name == "float16":
            name = "float32"
    return getattr(torch, name)


def load_model(
    folder: Path, device: torch.device | str, dtype: torch.dtype, division=None
) -> Transformer:
    """The checkpoint of `folder`, ready to run; division: of which this device holds a part
    (parallel.py). Raises UserError for what does not fit."""
    config = read_config(folder)
    if adapters := [name for name in ADAPTERS if (folder / name).is_file()]:
        warn(
            f"{folder}: the adapter ({', '.join(adapters)}) is not applied; merge it into the model"
        )
    with torch.device("meta"):  # shapes without storage: nothing is allocated, then overwritten
        whole = Transformer(config)
        model = whole if division is None else division.model()
    load_weights(model, folder, device, dtype, whole, division)
    model.init_rope(device)
    return model.eval()


def load_weights(
    model: torch.nn.Module,
    folder: Path,
    device: torch.device | str,
    dtype: torch.dtype,
    whole: torch.nn.Module | None = None,
    division=None,
) -> None:
    """Fills every parameter of `model`, built on the meta device, exactly once. whole: the model
    that the folder should hold, of which `model` is a part by a division."""
    whole = model if whole is None else whole
    tied = whole.config.tie_word_embeddings
    shapes = {name: tuple(weight.shape) for name, weight in named_weights(whole).items()}
    if tied:  # a tied checkpoint holds the embedding, or the head, or both
        shapes[HEAD] = shapes[EMBEDDING]
    plan = _plan(folder, shapes, tied)
    head = plan.pop(HEAD, None) if tied else None
    shared = tied and getattr(model.lm_head, "weight", None) is model.embed_tokens.weight

    for name, parameter in list(model.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        weight = torch.empty(parameter.shape, dtype=dtype, device=device)
        parameter = torch.nn.Parameter(weight, requires_grad=False)
        setattr(model.get_submodule(owner), leaf, parameter)
    if shared:
        model.lm_head.weight = model.embed_tokens.weight
    weights = named_weights(model)

    def read(tensors: safe_open, name: str, key: str) -> torch.Tensor:
        """What this device holds of a stored tensor."""
        if division is None:
            return tensors.get_tensor(key)
        return tensors.get_slice(key)[division.cut(name, shapes[name])]

    if tied and HEAD in weights:
        plan[HEAD] = plan[EMBEDDING]
    plan = {name: plan[name] for name in weights}
    for file, keys in _portions(plan, weights):
        # safe_open maps the file, and its tensors are views of it. A copy keeps no tie to the file.
        # Reopening now and then frees the pages that were copied already.
        with _opened(file) as tensors:
            for name, key in keys.items():
                stored = read(tensors, name, key)
                if stored.shape != weights[name].shape:  # it had the right one a moment ago
                    raise UserError(f"{file} changed while it was read; try again")
                weights[name].copy_(stored)

    if head is not None and EMBEDDING in weights:
        with _opened(head[0]) as tensors:
            stored = read(tensors, EMBEDDING, head[1])
            same = torch.equal(stored.to(device, dtype), weights[EMBEDDING])
        if not same:
            raise UserError(
                f"{head[0]}: {head[1]} differs from the embedding, yet config.json ties the two; "
                "set tie_word_embeddings to false there"
            )


def _portions(plan: dict, weights: dict[str, torch.Tensor]) -> Iterator[tuple[Path, dict]]:
    """What is read while a file is open, {name: tensor}: some PORTION bytes."""
    portions: dict[Path, dict] = {}
    sizes: Counter[Path] = Counter()
    for name, (file, key) in plan.items():
        portions.setdefault(file, {})[name] = key
        sizes[file] += weights[name].nbytes
        if sizes[file] >= PORTION:
            yield file, portions.pop(file)
            sizes[file] = 0
    yield from portions.items()


def named_weights(model: torch.nn.Module, read=torch.Tensor.detach) -> dict[str, torch.Tensor]:
    """Every weight under the name that the hub's checkpoints give it, less the leading `model.`:
    views of the parameters, which hold several weights where they are joined or stacked. read:
    what is wanted of a parameter."""
    weights = {}
    for name, parameter in model.named_parameters():
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        if isinstance(module, Joined):
            rows = read(parameter).split(list(module.parts.values()))
            owner = owner.rpartition(".")[0]
            parts = {f"{part}.{leaf}": w for part, w in zip(module.parts, rows, strict=True)}
        elif isinstance(module, Experts):
            parts = module.parts(leaf, read(parameter))
        else:
            parts = {leaf: read(parameter)}
        weights |= {f"{owner}.{part}".lstrip("."): weight for part, weight in parts.items()}
    return weights


def _plan(folder: Path, shapes: dict[str, tuple], tied: bool) -> dict:
    """Where each parameter is, {name: (file, tensor)}, once every header has been checked. tied:
    the embedding may be stored under the head's name, and needs no second copy there."""
    plan = {}
    unexpected, misshapen, quantized, twice = [], [], [], []
    for file, listed in _files(folder).items():
        with _opened(file) as tensors:
            found = {key: tensors.get_slice(key) for key in tensors.keys()}  # noqa: SIM118
            if lost := sorted(listed - set(found)):
                raise UserError(f"{file} lacks what the index lists: {_few(lost)}; fetch it again")
            for key, header in found.items():
                name, shape = key.removeprefix("model."), tuple(header.get_shape())
                if ROPE_BUFFER.fullmatch(name):
                    continue
                if name not in shapes:
                    unexpected.append(key)
                elif name in plan:
                    twice.append(key)
                elif header.get_dtype() not in FLOATS:
                    quantized.append(f"{key} ({header.get_dtype()})")
                elif shape != shapes[name]:
                    misshapen.append(f"{key} (is {list(shape)}, should be {list(shapes[name])})")
                plan[name] = (file, key)
    if tied and HEAD in plan and EMBEDDING not in plan:
        plan[EMBEDDING] = plan.pop(HEAD)
    missing = [name for name in shapes if name not in plan and not (tied and name == HEAD)]
    problems = {
        "quantized or integer": quantized,
        "misshapen": misshapen,
        "missing": missing,
        "unexpected": unexpected,
        "there twice": twice,
    }
    if told := [f"{what}: {_few(names)}" for what, names in problems.items() if names]:
        raise UserError(
            f"{folder}: the tensors do not fit config.json; {'; '.join(told)}; take a complete, "
            "unquantized checkpoint of this model"
        )
    return plan


def _files(folder: Path) -> dict[Path, set[str]]:
    """The safetensors files, each with the tensors that an index, if any, lists for it."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return {single: set()}
    if not index.is_file():
        pickles = sorted(p.name for p in folder.glob("*") if p.suffix in (".bin", ".pt", ".pth"))
        held = f" but {_few(pickles)}" if pickles else ""
        raise UserError(
            f"{folder} holds no model.safetensors (nor its index.json){held}; {NO_PICKLES}"
        )
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index} has no weight_map; fetch it again")
    files: dict[Path, set[str]] = {}
    for key, shard in weight_map.items():
        # An index may name files beside it only: no folder, no drive, no `..`.
        plain = isinstance(shard, str) and Path(shard).name == shard and "\\" not in shard
        if not plain or not shard.endswith(".safetensors"):
            raise UserError(f"{index}: {shard!r} should be a .safetensors file beside the index")
        files.setdefault(folder / shard, set()).add(key)
    if lost := [file.name for file in files if not file.is_file()]:
        raise UserError(
            f"{folder} lacks {_few(lost)}, which the index names; fetch the model again"
        )
    return files


@contextmanager
def _opened(file: Path) -> Iterator[safe_open]:
    try:
        with safe_open(file, framework="pt") as tensors:
            yield tensors
    except (SafetensorError, OSError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{file} is damaged or no safetensors file ({reason}); fetch it again, in a git clone "
            "with git lfs pull"
        ) from None


def _few(names: list[str], most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
