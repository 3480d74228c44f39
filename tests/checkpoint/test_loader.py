"""The loader: every parameter filled once and exactly, and every damaged checkpoint one line."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lethe_mini.checkpoint import load as loader
from lethe_mini.checkpoint.config import parse_config
from lethe_mini.checkpoint.load import load_model, load_weights, named_weights, resolve
from lethe_mini.errors import UserError
from lethe_mini.model import Transformer

CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "vocab_size": 37,
    "hidden_size": 24,
    "intermediate_size": 29,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
}
TIED = CONFIG | {"tie_word_embeddings": True}


def checkpoint(config, dtype=torch.float32):
    """Random tensors under the hub's names: what a model with this config is made of."""
    with torch.device("meta"):
        model = Transformer(parse_config(config))
    return {
        name if name.startswith("lm_head") else f"model.{name}": torch.randn(p.shape).to(dtype)
        for name, p in named_weights(model).items()
    }


def write(folder, tensors, config=CONFIG, shards=1):
    """A model folder; with several shards also an index that tells which tensor is where."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    names = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    weight_map = {key: names[i % shards] for i, key in enumerate(tensors)}
    for name in names:
        part = {key: tensors[key] for key in tensors if weight_map[key] == name}
        save_file(part, folder / name)
    write_index(folder, weight_map)
    return folder


def write_index(folder, weight_map):
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def load(folder, dtype=torch.float32):
    return load_model(folder, "cpu", dtype)


def refused(folder, match):
    with pytest.raises(UserError, match=match) as caught:
        load(folder)
    assert len(str(caught.value).splitlines()) == 1
    assert str(folder) in str(caught.value)
    return str(caught.value)


def assert_holds(model, tensors, dtype=torch.float32):
    loaded = named_weights(model)
    assert len(loaded) == len(tensors)
    for key, tensor in tensors.items():
        parameter = loaded[key.removeprefix("model.")]
        assert parameter.dtype == dtype
        assert torch.equal(parameter, tensor.to(dtype)), key


# --- what loads


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("config", [CONFIG, TIED], ids=["untied", "tied"])
@pytest.mark.parametrize("saved", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_parameter_is_filled(tmp_path, shards, config, saved, dtype):
    tensors = checkpoint(config, saved)
    model = load(write(tmp_path / "m", tensors, config, shards), dtype)
    assert_holds(model, tensors, dtype)
    assert not any(p.is_meta or p.requires_grad for p in model.parameters())
    assert not model.training


@pytest.mark.parametrize("config", [CONFIG, TIED], ids=["untied", "tied"])
def test_the_model_computes(tmp_path, config):
    model = load(write(tmp_path / "m", checkpoint(config), config))
    logits = model(torch.tensor([[1, 2, 3, 5, 7]]))
    assert logits.shape == (1, 5, 37)
    assert logits.isfinite().all()


def test_tied_weights_are_one_tensor(tmp_path):
    model = load(write(tmp_path / "m", checkpoint(TIED), TIED))
    assert model.lm_head.weight is model.embed_tokens.weight
    untied = load(write(tmp_path / "n", checkpoint(CONFIG)))
    assert untied.lm_head.weight is not untied.embed_tokens.weight


@pytest.mark.parametrize("shards", [1, 3])
def test_a_tied_checkpoint_may_hold_an_equal_head(tmp_path, shards):
    tensors = checkpoint(TIED, torch.bfloat16)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    model = load(write(tmp_path / "m", tensors, TIED, shards))
    assert model.lm_head.weight is model.embed_tokens.weight


def test_a_tied_checkpoint_with_another_head_is_refused(tmp_path):
    tensors = checkpoint(TIED)
    tensors["lm_head.weight"] = torch.randn(37, 24)
    refused(write(tmp_path / "m", tensors, TIED), "differs from the embedding.*tie_word_embeddings")


def test_rope_frequencies_of_old_checkpoints_are_skipped(tmp_path):
    tensors = checkpoint(CONFIG)
    extra = {"model.layers.1.self_attn.rotary_emb.inv_freq": torch.ones(2)}
    assert_holds(load(write(tmp_path / "m", tensors | extra)), tensors)


@pytest.mark.parametrize("content", [b"\0", None], ids=["overwritten", "deleted"])
def test_the_weights_outlive_the_file(tmp_path, content):
    # safe_open hands out views of the mapped file: they would change with it.
    tensors = checkpoint(CONFIG)
    model = load(write(tmp_path / "m", tensors))
    path = tmp_path / "m" / "model.safetensors"
    if content is None:
        path.unlink()
    else:
        with path.open("r+b") as file:
            file.write(content * path.stat().st_size)
    assert_holds(model, tensors)


def test_one_file_has_precedence_over_an_index(tmp_path):
    tensors = checkpoint(CONFIG)
    folder = write(tmp_path / "m", tensors)
    write_index(folder, {"stale": "gone.safetensors"})
    assert_holds(load(folder), tensors)


MEASURED = """
import json, resource, sys, torch
from pathlib import Path
from lethe_mini.checkpoint.load import load_model
folder = Path(sys.argv[1])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
model = load_model(folder, "cpu", getattr(torch, sys.argv[2]))
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps([after - before, sum(p.nbytes for p in model.parameters())]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss has other units elsewhere")
@pytest.mark.parametrize(("shards", "dtype"), [(1, "float32"), (2, "bfloat16")])
def test_memory_holds_one_copy(tmp_path, shards, dtype):
    config = CONFIG | {
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 7,
        "vocab_size": 1009,
    }
    folder = write(tmp_path / "m", checkpoint(config), config, shards)  # some 200 MB
    command = [sys.executable, "-c", MEASURED, str(folder), dtype]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    grown_kib, weights = json.loads(done.stdout)
    assert 70e6 < weights < 250e6
    # One tensor in flight and the allocator's slack; a second copy would be far more.
    assert grown_kib * 1024 < weights + 50e6


EXPERTS = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_experts": 11,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 13,
    "mlp_only_layers": [0],
}


@pytest.mark.parametrize("shards", [1, 3])
def test_experts_stored_one_by_one_are_stacked(tmp_path, shards):
    """Each under its own name in the file, and a part of one parameter in memory."""
    tensors = checkpoint(CONFIG | EXPERTS)
    assert "model.layers.0.mlp.gate_proj.weight" in tensors
    assert sum(".mlp.experts." in name for name in tensors) == 3 * 11
    model = load(write(tmp_path / "m", tensors, CONFIG | EXPERTS, shards))
    assert_holds(model, tensors)
    mixture, prefix = model.layers[1].mlp, "model.layers.1.mlp"
    assert torch.equal(mixture.gate.weight, tensors[f"{prefix}.gate.weight"])
    for e in range(11):
        gate, up = (tensors[f"{prefix}.experts.{e}.{n}_proj.weight"] for n in ("gate", "up"))
        assert torch.equal(mixture.gate_up_proj[e], torch.cat((gate, up)))
        down = tensors[f"{prefix}.experts.{e}.down_proj.weight"]
        assert torch.equal(mixture.down_proj[e], down)


def test_a_missing_expert_is_named(tmp_path):
    tensors = checkpoint(CONFIG | EXPERTS)
    del tensors["model.layers.1.mlp.experts.7.up_proj.weight"]
    folder = write(tmp_path / "m", tensors, CONFIG | EXPERTS)
    refused(folder, r"missing: layers\.1\.mlp\.experts\.7\.up_proj\.weight;")


def test_a_file_of_many_small_tensors_is_opened_few_times(tmp_path, monkeypatch):
    """Reading the header again for each of a mixture's 18,000 tensors took half a minute."""
    opened, safe_open = [], loader.safe_open
    folder = write(tmp_path / "m", checkpoint(CONFIG | EXPERTS), CONFIG | EXPERTS)
    monkeypatch.setattr(loader, "safe_open", lambda *a, **k: opened.append(0) or safe_open(*a, **k))
    load(folder)
    assert len(opened) <= 2
    monkeypatch.setattr(loader, "PORTION", 20_000)
    opened.clear()
    load(folder)
    assert 4 < len(opened) < 20


@pytest.mark.parametrize(
    ("shape", "match"), [((24, 3), "changed while it was read"), (None, "damaged")]
)
def test_a_file_that_changes_while_it_is_read_is_one_line(tmp_path, monkeypatch, shape, match):
    """After its header was checked a tensor has another shape, or is gone."""
    tensors, portions = checkpoint(CONFIG), loader._portions
    folder = write(tmp_path / "m", tensors)

    def changed(*args):
        del tensors["model.norm.weight"]
        if shape is not None:
            tensors["model.norm.weight"] = torch.zeros(shape)
        save_file(tensors, folder / "model.safetensors")
        yield from portions(*args)

    monkeypatch.setattr(loader, "_portions", changed)
    refused(folder, match)


# --- what does not fit


def test_a_missing_tensor_is_named(tmp_path):
    tensors = checkpoint(CONFIG)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    refused(write(tmp_path / "m", tensors), r"missing: layers\.1\.mlp\.up_proj\.weight;")


def test_an_untied_checkpoint_needs_its_head(tmp_path):
    refused(write(tmp_path / "m", checkpoint(TIED)), r"missing: lm_head\.weight;")


def test_an_unexpected_tensor_is_named(tmp_path):
    tensors = checkpoint(CONFIG) | {"model.layers.0.self_attn.q_norm.weight": torch.ones(4)}
    refused(write(tmp_path / "m", tensors), r"unexpected: model\.layers\.0\.self_attn\.q_norm")


def test_a_layer_too_many_is_unexpected(tmp_path):
    tensors = checkpoint(CONFIG)
    refused(write(tmp_path / "m", tensors, CONFIG | {"num_hidden_layers": 1}), "unexpected: .*more")


def test_a_long_list_is_cut(tmp_path):
    tensors = checkpoint(CONFIG)
    some = {key: tensors[key] for key in list(tensors)[:2]}
    message = refused(write(tmp_path / "m", some), f"missing: .* and {len(tensors) - 5} more;")
    assert len(message) < 500


@pytest.mark.parametrize("shape", [(24,), (37, 23), (24, 37), (1, 24), ()])
def test_a_misshapen_tensor_is_named_with_both_shapes(tmp_path, shape):
    # `copy_` would broadcast some of these.
    tensors = checkpoint(CONFIG) | {"lm_head.weight": torch.ones(shape)}
    message = refused(write(tmp_path / "m", tensors), r"misshapen: lm_head\.weight")
    assert f"is {list(shape)}, should be [37, 24]" in message
    assert "missing" not in message


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.uint8, torch.float8_e4m3fn])
def test_quantized_tensors_are_refused(tmp_path, dtype):
    tensors = checkpoint(CONFIG) | {"lm_head.weight": torch.ones(37, 24).to(dtype)}
    refused(write(tmp_path / "m", tensors), r"quantized or integer: lm_head\.weight")


def test_two_names_for_one_parameter_are_refused(tmp_path):
    tensors = checkpoint(CONFIG)
    tensors["norm.weight"] = tensors["model.norm.weight"].clone()
    refused(write(tmp_path / "m", tensors), "there twice: (model.)?norm.weight")


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    tensors = checkpoint(CONFIG)
    folder = write(tmp_path / "m", tensors, shards=2)
    first = {key: tensors[key] for i, key in enumerate(tensors) if i % 2 == 0}
    first["lm_head.weight"] = first["model.norm.weight"] = tensors["model.norm.weight"]
    twice = next(key for i, key in enumerate(tensors) if i % 2)
    save_file(
        {k: v.clone() for k, v in first.items()} | {twice: tensors[twice]},
        folder / "model-00001-of-00002.safetensors",
    )
    refused(folder, f"there twice: .*{twice}")


# --- damaged files


@pytest.mark.parametrize("size", [0, 5, 100, -1, -1000])
def test_a_truncated_file_is_one_line(tmp_path, size):
    folder = write(tmp_path / "m", checkpoint(CONFIG))
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    refused(folder, "is damaged or no safetensors file")


@pytest.mark.parametrize("content", [b"\xff" * 64, b"version https://git-lfs.github.com/spec/v1\n"])
def test_a_file_that_is_no_safetensors_is_one_line(tmp_path, content):
    folder = write(tmp_path / "m", checkpoint(CONFIG), shards=2)
    (folder / "model-00002-of-00002.safetensors").write_bytes(content)
    refused(folder, "is damaged or no safetensors file .*git lfs pull")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickles_are_never_read(tmp_path, name, monkeypatch):
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("it was unpickled"))
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    torch.save({}, folder / name)
    refused(folder, f"but {name}; pickled weights .* are never read, so convert")


def test_a_folder_without_weights_says_so(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    refused(tmp_path, r"holds no model\.safetensors")


@pytest.mark.parametrize(
    "shard",
    [
        "../model.safetensors",
        "/etc/model.safetensors",
        "sub/model.safetensors",
        "sub\\model.safetensors",
        "..",
        ".",
        "",
        "model.bin",
        "a\0.safetensors/..",
        7,
        None,
        ["model.safetensors"],
    ],
)
def test_an_index_cannot_point_out_of_its_folder(tmp_path, shard):
    tensors = checkpoint(CONFIG)
    write(tmp_path, tensors)  # there would be something to find
    folder = write(tmp_path / "m", tensors, shards=2)
    write_index(folder, dict.fromkeys(tensors, shard))
    refused(folder, "should be a .safetensors file beside the index")


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("{", "is not JSON"),
        ("[]", "not a list"),
        ("{}", "no weight_map"),
        ('{"weight_map": {}}', "no weight_map"),
        ('{"weight_map": ["a"]}', "no weight_map"),
    ],
)
def test_a_damaged_index_is_one_line(tmp_path, content, match):
    folder = write(tmp_path / "m", checkpoint(CONFIG), shards=2)
    (folder / "model.safetensors.index.json").write_text(content)
    refused(folder, match)


def test_a_missing_shard_is_named(tmp_path):
    folder = write(tmp_path / "m", checkpoint(CONFIG), shards=3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    refused(folder, "lacks model-00002-of-00003.safetensors, which the index names")


def test_a_tensor_that_is_not_in_its_shard_is_named(tmp_path):
    tensors = checkpoint(CONFIG)
    folder = write(tmp_path / "m", tensors, shards=2)
    some = dict(list(tensors.items())[:1])
    save_file(some, folder / "model-00001-of-00002.safetensors")
    refused(folder, "model-00001-of-00002.safetensors lacks what the index lists: .* more")


def test_nothing_is_allocated_for_a_checkpoint_that_does_not_fit(tmp_path):
    tensors = checkpoint(CONFIG)
    del tensors["lm_head.weight"]
    with torch.device("meta"):
        model = Transformer(parse_config(CONFIG))
    with pytest.raises(UserError):
        load_weights(model, write(tmp_path / "m", tensors), "cpu", torch.float32)
    assert all(p.is_meta for p in model.parameters())


# --- names


def test_a_folder_resolves_to_itself(tmp_path, monkeypatch):
    assert resolve(str(tmp_path)) == tmp_path
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "m").mkdir()
    assert resolve("~/m") == tmp_path / "m"
    monkeypatch.chdir(tmp_path)
    assert resolve("m").samefile(tmp_path / "m")
    assert resolve(".").samefile(tmp_path)


def test_demo_is_a_name_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr("lethe_mini.checkpoint.demo.demo_folder", lambda: tmp_path)
    assert resolve("demo") == tmp_path


def test_the_reasoner_ships_with_the_package():
    assert resolve("reasoner") == Path(loader.__file__).parents[1] / "reasoner"


@pytest.mark.parametrize(
    "name",
    ["", "~", "./no", "../no", "/no", "~/no", "~nobody-here/m", "a/b/c", "a\\b", "a/" * 5000],
)
def test_a_path_that_is_not_there_is_no_hub_id(tmp_path, monkeypatch, name):
    monkeypatch.setattr(loader, "_fetch", lambda *_: pytest.fail("asked the hub"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "away"))
    with pytest.raises(UserError, match="no such folder"):
        resolve(name)


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "model.gguf").touch()
    with pytest.raises(UserError, match="is a file"):
        resolve(str(tmp_path / "model.gguf"))


@pytest.mark.parametrize("model", ["reasoner", "demo", "here"])
def test_a_revision_is_for_the_hub_only(tmp_path, model):
    with pytest.raises(UserError, match="leave it out"):
        resolve(str(tmp_path) if model == "here" else model, revision="main")
