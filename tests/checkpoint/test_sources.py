"""A fact that several files of a checkpoint tell: transformers says who is heard, and a line on
standard error names the two that disagree. docs/CHECKPOINTS.md lists the facts.

Warnings are errors here, so a test without `disagree` shows that its files agree.
"""

import ast
import json
import re
from contextlib import nullcontext
from pathlib import Path

import pytest
import tiny
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing

from lethe_mini.app import cli
from lethe_mini.checkpoint.config import parse_config
from lethe_mini.checkpoint.load import load_model
from lethe_mini.checkpoint.text import Text
from lethe_mini.errors import CheckpointWarning, UserError

ROOT = Path(__file__).parents[2]
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LINEAR = {"type": "linear", "factor": 4.0}
PLAIN = {"rope_type": "default", "rope_theta": 10000.0}
ORIGINAL = "original_max_position_embeddings"
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}


def disagree(*names):
    """A warning, of one line, that names them all; without names there is none."""
    if not names:
        return nullcontext()
    return pytest.warns(CheckpointWarning, match=".*".join(map(re.escape, names)))


def edit(folder, name, **changes):
    """Sets keys of a JSON file of the folder."""
    path = folder / name
    data = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(data | changes))


# --- RoPE


def rope_of(path, **changes):
    """The largest difference of the logits from transformers', with a Llama of this config."""
    folder = tiny.folder(path, rms_norm_eps=1e-6, **LLAMA)
    edit(folder, "config.json", **changes)
    ids = torch.arange(80, 200)[None]
    with torch.no_grad():
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        theirs = model(ids).logits
        ours = load_model(folder, "cpu", torch.float32)(ids)
    return (ours - theirs).abs().max()


@pytest.mark.parametrize(
    ("said", "named"),
    [
        ({"rope_scaling": YARN, "rope_parameters": PLAIN}, ("rope_scaling", "rope_parameters")),
        ({"rope_scaling": LINEAR, "rope_parameters": PLAIN}, ("rope_scaling", "rope_parameters")),
        ({"rope_scaling": LINEAR, "rope_parameters": YARN}, ("rope_scaling", "rope_parameters")),
        ({"rope_scaling": YARN, "rope_parameters": {**YARN, "rope_theta": 1e4}}, ()),
        ({"rope_scaling": {}, "rope_parameters": LINEAR}, ()),
        ({"rope_scaling": None, "rope_parameters": {**LINEAR, "rope_theta": 5e5}}, ()),
        (
            {"rope_scaling": LINEAR, "rope_parameters": {**LINEAR, "rope_theta": 5e5}}
            | {"rope_theta": 7e5},
            ("rope_theta (700000.0)", "rope_theta of rope_parameters (500000.0)"),
        ),
        (
            {"rope_scaling": {**LINEAR, "rope_theta": 3e5}}
            | {"rope_parameters": {**LINEAR, "rope_theta": 5e5}},
            ("rope_theta of rope_scaling (300000.0)", "rope_theta of rope_parameters (500000.0)"),
        ),
        (
            {"rope_parameters": {**PLAIN, "rope_theta": 5e5}, "rope_theta": 7e5},
            ("rope_theta of rope_parameters (500000.0)", "rope_theta (700000.0)"),
        ),
        ({"rope_parameters": {**PLAIN, "rope_theta": 5e5}, "rope_theta": 500000}, ()),
        (
            {"rope_scaling": {**LINEAR, "rope_type": "yarn"}},
            ("rope_type of rope_scaling ('yarn')", "type of rope_scaling ('linear')"),
        ),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}, ORIGINAL: 64}, ()),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, ()),
        ({"rope_scaling": {**LLAMA3, ORIGINAL: 64}, ORIGINAL: 64}, ()),
        *(
            (
                {"rope_scaling": {**numbers, ORIGINAL: 64}, ORIGINAL: 1024},
                (f"{ORIGINAL} at the top level (1024)", f"{ORIGINAL} of RoPE (64)"),
            )
            for numbers in (YARN, LLAMA3)
        ),
        ({"rope_scaling": LINEAR, ORIGINAL: 64}, ()),
    ],
)
def test_rope_is_what_transformers_makes_of_all_its_sources(tmp_path, said, named):
    with disagree(*named):
        assert rope_of(tmp_path / "m", **said) < 1e-4


def test_a_theta_that_only_the_dictionary_has_that_is_not_read_is_refused():
    """transformers would go on with 10,000, which nobody can mean."""
    config = {**tiny.SIZES, "rope_parameters": {**LINEAR, "rope_theta": 5e5}}
    with pytest.raises(UserError, match=r"only rope_parameters has rope_theta \(500000\.0\)"):
        parse_config({**config, "rope_scaling": LINEAR})


# --- other keys of config.json


def test_dtype_has_the_word_before_torch_dtype():
    with disagree("dtype ('float16')", "torch_dtype ('bfloat16')"):
        config = parse_config({**tiny.SIZES, "dtype": "float16", "torch_dtype": "bfloat16"})
    assert config.dtype == "float16"
    assert transformers.LlamaConfig(dtype="float16", torch_dtype="bfloat16").dtype == torch.float16
    config = parse_config({**tiny.SIZES, "dtype": "float16", "torch_dtype": "float16"})
    assert config.dtype == "float16"
    assert parse_config({**tiny.SIZES, "dtype": None, "torch_dtype": "float16"}).dtype == "float16"


def test_the_number_of_experts_has_two_names():
    mixture = {"architectures": ["Qwen3MoeForCausalLM"], "num_experts_per_tok": 2}
    mixture |= {"moe_intermediate_size": 5, "num_local_experts": 7, "num_experts": 8}
    with disagree("num_local_experts (7)", "num_experts (8)"):
        assert parse_config({**tiny.SIZES, **mixture}).num_experts == 7
    assert transformers.Qwen3MoeConfig(num_local_experts=7, num_experts=8).num_experts == 7


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Qwen2", "Qwen3", "Qwen3Moe"])
def test_without_a_word_no_family_ties_its_head(family):
    assert not getattr(transformers, f"{family}Config")().tie_word_embeddings
    more = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 5}
    more |= {"sliding_window": None, "architectures": [f"{family}ForCausalLM"]}
    assert not parse_config({**tiny.SIZES, **more}).tie_word_embeddings


# --- weights


@pytest.mark.parametrize("stored", [("embedding",), ("head",), ("embedding", "head")])
def test_a_tied_checkpoint_may_store_either_tensor(tmp_path, stored):
    folder = tiny.folder(tmp_path / "m", tie_word_embeddings=True, **LLAMA)
    weights = load_file(folder / "model.safetensors")
    embedding = weights.pop("model.embed_tokens.weight")
    named = {"embedding": "model.embed_tokens.weight", "head": "lm_head.weight"}
    weights |= {named[one]: embedding.clone() for one in stored}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    model = load_model(folder, "cpu", torch.float32)
    assert torch.equal(model.embed_tokens.weight, embedding)
    assert model.lm_head.weight is model.embed_tokens.weight
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert torch.equal(theirs.model.embed_tokens.weight, embedding)


def test_a_tied_checkpoint_needs_one_of_the_two(tmp_path):
    folder = tiny.folder(tmp_path / "m", tie_word_embeddings=True)
    weights = load_file(folder / "model.safetensors")
    del weights["model.embed_tokens.weight"]
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"missing: embed_tokens\.weight;"):
        load_model(folder, "cpu", torch.float32)


@pytest.mark.parametrize(
    "name",
    ["rotary_emb.inv_freq", "layers.1.self_attn.rotary_emb.inv_freq", "rotary_emb.cos_cached"],
)
def test_what_rope_was_computed_with_is_passed_over(tmp_path, name):
    folder = tiny.folder(tmp_path / "m")
    weights = load_file(folder / "model.safetensors") | {f"model.{name}": torch.ones(5)}
    save_file(weights, folder / "model.safetensors")
    model = load_model(folder, "cpu", torch.float32)
    assert torch.equal(model.inv_freq, tiny.model().inv_freq)


@pytest.mark.parametrize("name", ["my_rotary_emb.inv_freq", "rotary_emb.inv_freq.weight"])
def test_what_only_looks_like_it_is_not(tmp_path, name):
    folder = tiny.folder(tmp_path / "m")
    weights = load_file(folder / "model.safetensors") | {f"model.{name}": torch.ones(5)}
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(UserError, match="unexpected"):
        load_model(folder, "cpu", torch.float32)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_an_adapter_beside_the_model_is_not_applied_and_that_is_said(tmp_path, name):
    folder = tiny.folder(tmp_path / "m")
    (folder / name).write_text("{}")
    with disagree(str(folder), name, "not applied"):
        load_model(folder, "cpu", torch.float32)


# --- special tokens

words = st.sampled_from(["<x>", "<y>", tiny.START, tiny.END, "a", "", "\ud800", "é\n"])
START, END = "<|im_start|>", "<|im_end|>"
CHAT = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}{{ m.content }}<|im_end|>"
    "{% endfor %}"
)
FLAGS = {"special": True, "normalized": False, "lstrip": False, "rstrip": False}


def with_files(path, size=280, **files):
    """A folder whose tokenizer.json has 258 tokens, and other files: `config={...}` is merged into
    config.json. size: of the model's vocabulary."""
    folder = tiny.folder(path, template=CHAT, eos=(), vocab_size=size, **LLAMA)
    edit(folder, "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    for name, content in files.items():
        edit(folder, f"{name}.json", **content)
    return folder


def declared(*tokens, first=258, **flags):
    """`added_tokens_decoder` with these tokens."""
    return {str(first + i): {"content": t, **FLAGS, **flags} for i, t in enumerate(tokens)}


def assert_like_transformers(folder):
    """The prompt of a chat, plain texts, and what is skipped in an answer."""
    ours, theirs = Text(folder), transformers.AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": "Hi"}]
    prompt = theirs.apply_chat_template(messages, return_dict=False)
    assert ours.encode_prompt(messages) == prompt
    for text in (f"a {START} b{END}<image> c <pad>\n", "", START):
        ids = theirs.encode(text)
        assert ours.encode(text) == ids
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    return ours


BOTH = {START: 258, END: 259}


@pytest.mark.parametrize(
    "files",
    [
        {"added_tokens": BOTH},
        {"added_tokens": BOTH, "tokenizer_config": {"eos_token": END}},
        {"added_tokens": {tiny.START: 256, **BOTH}},
        {"added_tokens": BOTH, "tokenizer_config": {"additional_special_tokens": [START, END]}},
        {"tokenizer_config": {"added_tokens_decoder": declared(START, END)}},
        {"tokenizer_config": {"added_tokens_decoder": declared(START, END, special=False)}},
        {"tokenizer_config": {"added_tokens_decoder": declared(START, END, rstrip=True)}},
        {
            "tokenizer_config": {
                "added_tokens_decoder": declared(START, END, special=False),
                "eos_token": END,
            }
        },
        # how a token of tokenizer.json matches can be told again, and then otherwise
        {
            "tokenizer_config": {
                "added_tokens_decoder": declared(
                    tiny.START, tiny.END, START, first=256, lstrip=True
                )
            }
        },
        {"tokenizer_config": {"additional_special_tokens": [START, END]}},
        {"tokenizer_config": {"extra_special_tokens": [START, END]}},
        {
            "tokenizer_config": {
                "extra_special_tokens": [START],
                "additional_special_tokens": [END],
            }
        },
        {"tokenizer_config": {"extra_special_tokens": {"image_token": "<image>"}}},
        {"tokenizer_config": {"image_token": "<image>", "pad_token": "<pad>", "bos_token": START}},
        {"special_tokens_map": {"bos_token": {"content": START, "rstrip": True}}},
        {"special_tokens_map": {"bos_token": START, "pad_token": "<pad>"}},
        # a decoder, even an empty one, hides the two older files
        {
            "tokenizer_config": {"added_tokens_decoder": {}, "pad_token": "<pad>"},
            "special_tokens_map": {"bos_token": START},
            "added_tokens": {START: 1000},
        },
    ],
)
def test_tokens_beside_tokenizer_json_are_added(tmp_path, files):
    assert_like_transformers(with_files(tmp_path / "m", **files))


def test_what_the_older_file_lists_is_special(tmp_path):
    files = {"added_tokens": BOTH, "special_tokens_map": {"additional_special_tokens": [START]}}
    text = Text(with_files(tmp_path / "m", **files))
    assert text.decode(text.encode(f"a{START}b{END}c")) == f"ab{END}c"


def test_the_older_file_has_the_word_where_it_is_read(tmp_path):
    files = {"special_tokens_map": {"bos_token": START}, "tokenizer_config": {"bos_token": END}}
    folder = with_files(tmp_path / "m", **files)
    with disagree("bos_token of special_tokens_map.json", "bos_token of tokenizer_config.json"):
        assert_like_transformers(folder)


def test_a_template_gets_every_token_that_has_a_name(tmp_path):
    settings = {"extra_special_tokens": {"image_token": "<image>"}, "think_token": "<think>"}
    settings |= {"bos_token": {"content": START}, "unk_token": None, "add_bos_token": False}
    other = {"pad_token": {"content": "<pad>"}, "unk_token": None}
    folder = with_files(tmp_path / "m", tokenizer_config=settings, special_tokens_map=other)
    assert Text(folder).template.specials == {
        **{"image_token": "<image>", "think_token": "<think>"},
        **{"bos_token": START, "pad_token": "<pad>"},
    }


@pytest.mark.parametrize(
    ("files", "match"),
    [
        (
            {"added_tokens": {START: 259}},
            r"added_tokens\.json says that .* is token 259.* it is 258",
        ),
        ({"added_tokens": {tiny.START: 258}}, "is token 258, .* it is 256"),
        ({"added_tokens": {START: 257}}, "is token 257, .* it is 258"),
        (
            {"tokenizer_config": {"added_tokens_decoder": declared(START, first=270)}},
            r"tokenizer_config\.json \(added_tokens_decoder\) says .* is token 270",
        ),
        ({"added_tokens": {START: "258a"}}, "should give tokens ids"),
        ({"added_tokens": {START: None}}, "should give tokens ids"),
        ({"added_tokens": {"": 258}}, "should give tokens ids"),
        ({"tokenizer_config": {"added_tokens_decoder": [START]}}, "should give tokens ids"),
        ({"tokenizer_config": {"added_tokens_decoder": {"258": 7}}}, "should give tokens ids"),
        ({"tokenizer_config": {"added_tokens_decoder": {"x": START}}}, "should give tokens ids"),
    ],
)
def test_ids_that_do_not_fit_are_one_line(tmp_path, files, match):
    with pytest.raises(UserError, match=match) as caught:
        Text(with_files(tmp_path / "m", **files))
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    "files",
    [
        {"added_tokens": {"<pad>": 258}},
        {"added_tokens": {"<pad>": 300}, "tokenizer_config": {"pad_token": "<pad>"}},
        {"tokenizer_config": {"added_tokens_decoder": declared("<pad>")}},
        {"tokenizer_config": {"pad_token": "<pad>"}},
        {"special_tokens_map": {"pad_token": "<pad>"}},
    ],
)
def test_a_token_without_an_embedding_is_left_out(tmp_path, files):
    """As the padding of many tuned models is, which no prompt needs."""
    folder = with_files(tmp_path / "m", size=258, **files)
    with pytest.warns(CheckpointWarning, match="'<pad>'.* no embedding") as caught:
        text = Text(folder)
    assert len(caught) == 1
    assert len(text.encode("<pad>")) == 5


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | words,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(words, inner, max_size=2),
    max_leaves=4,
)
contents = words | st.builds(
    lambda text, flag: {"content": text, "lstrip": flag}, words, json_values
)
settings = st.fixed_dictionaries(
    {},
    optional={
        "bos_token": contents | json_values,
        "eos_token": contents | json_values,
        "added_tokens_decoder": json_values
        | st.dictionaries(st.sampled_from(["258", "259", "9", "x"]), contents, max_size=2),
        "extra_special_tokens": st.lists(contents) | st.dictionaries(words, contents) | json_values,
        "additional_special_tokens": st.lists(contents) | json_values,
        "add_bos_token": json_values,
    },
)


@pytest.mark.filterwarnings("ignore::lethe_mini.errors.CheckpointWarning")
@given(
    settings,
    settings,
    st.dictionaries(words, st.integers(250, 262) | json_values, max_size=2),
    st.none() | st.integers(0, 300) | st.lists(st.integers()) | json_values,
)
def test_any_json_gives_a_text_or_one_line(tmp_path_factory, own, other, added, ends):
    folder = tmp_path_factory.mktemp("any")
    tiny.byte_tokenizer().save(str(folder / "tokenizer.json"))
    edit(folder, "tokenizer_config.json", **own)
    edit(folder, "special_tokens_map.json", **other)
    edit(folder, "added_tokens.json", **added)
    edit(folder, "config.json", eos_token_id=ends, vocab_size=260)
    edit(folder, "generation_config.json", eos_token_id=257)
    refusal = text = None
    try:
        text = Text(folder)
    except UserError as error:
        refusal = str(error)
    if text is None:
        assert len(refusal.splitlines()) == 1
        return
    assert 257 in text.eos_ids
    assert all(id < 260 for id in text.encode("a<x><y>b"))


# --- what goes around a text

BEGIN = {"bos_token": tiny.START, "eos_token": tiny.END}


@pytest.mark.parametrize("own", [None, tiny.START, tiny.END])
@pytest.mark.parametrize("bos", [None, True, False])
@pytest.mark.parametrize("eos", [None, True, False])
def test_begin_and_end_of_a_text_are_as_in_transformers(tmp_path, own, bos, eos):
    folder = with_files(tmp_path / "m", generation_config={"eos_token_id": 257})
    tokenizer = tiny.byte_tokenizer()
    if own is not None:
        id = tokenizer.token_to_id(own)
        single = [own, "$A"] if own == tiny.START else ["$A", own]
        tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=[(own, id)])
    tokenizer.save(str(folder / "tokenizer.json"))
    edit(folder, "tokenizer_config.json", **BEGIN, add_bos_token=bos, add_eos_token=eos)
    theirs = transformers.AutoTokenizer.from_pretrained(folder).encode("ab")
    wrong = bos == (own != tiny.START) if bos is not None else False
    wrong |= eos == (own != tiny.END) if eos is not None else False
    with disagree(*(("tokenizer.json", "of tokenizer_config.json") if wrong else ())):
        assert Text(folder).encode("ab") == theirs


def test_one_token_may_begin_and_end_a_text(tmp_path):
    """As in GPT-2's vocabulary: before a text it is no end."""
    folder = with_files(tmp_path / "m", generation_config={"eos_token_id": 256})
    tokenizer, own = tiny.byte_tokenizer(), tiny.START
    tokenizer.post_processor = TemplateProcessing(single=[own, "$A"], special_tokens=[(own, 256)])
    tokenizer.save(str(folder / "tokenizer.json"))
    flags = {"add_bos_token": True, "add_eos_token": False}
    edit(folder, "tokenizer_config.json", bos_token=own, eos_token=own, **flags)
    assert Text(folder).encode("a") == tokenizer.encode("a").ids == [256, 64]


def test_a_token_that_is_not_there_goes_nowhere(tmp_path):
    folder = with_files(tmp_path / "m", tokenizer_config={"add_bos_token": True})
    assert assert_like_transformers(folder).encode("ab") == tiny.byte_tokenizer().encode("ab").ids


# --- what ends a text


def ends(path, generation=None, config=None, eos=None):
    files = {"generation_config": {"eos_token_id": generation}, "config": {"eos_token_id": config}}
    return Text(with_files(path / "m", tokenizer_config={"eos_token": eos}, **files)).eos_ids


def test_both_files_end_a_text_else_the_tokenizers_token(tmp_path):
    assert ends(tmp_path, generation=257, config=256) == {256, 257}
    assert ends(tmp_path, generation=7) == {7}
    assert ends(tmp_path, config=7) == {7}
    assert ends(tmp_path, config=[7, 256], eos=tiny.START) == {7, 256}
    assert ends(tmp_path, eos=tiny.END) == {257}
    assert ends(tmp_path, generation=257, config=279) == {257, 279}  # beyond tokenizer.json
    assert ends(tmp_path, generation=257, config=-1) == {257, -1}


def test_ordinary_text_is_no_end_where_only_config_json_says_so(tmp_path):
    """LlamaConfig's default is 2, which many a vocabulary has as a letter."""
    with disagree("eos_token_id 2 of config.json", "generation_config.json has [257]"):
        assert ends(tmp_path, generation=257, config=[2, 257]) == {257}


def test_an_eos_token_that_no_file_counts_as_an_end_is_named(tmp_path):
    with disagree(
        f"eos_token '{tiny.END}' (257)", "generation_config.json or config.json is [256]"
    ):
        assert ends(tmp_path, generation=256, eos=tiny.END) == {256}


# --- how it is said, and where


def test_the_command_says_it_in_a_line_and_once(tmp_path, capsys):
    folder = tiny.folder(tmp_path / "m")
    edit(folder, "config.json", dtype="float32", torch_dtype="float16")
    (folder / "adapter_config.json").write_text("{}")
    options = ["--model", folder, "--prompt", "a", "--raw", "--max-new-tokens", "2", "--quiet"]
    for _ in range(2):  # once in each run
        assert cli.main(list(map(str, options))) == 0
        dtype, adapter = capsys.readouterr().err.splitlines()
        assert dtype == (
            f"warning: {folder}/config.json: dtype ('float32') is used, not torch_dtype ('float16')"
            ", which says otherwise"
        )
        assert adapter.startswith(f"warning: {folder}: the adapter (adapter_config.json)")


def rows():
    """The facts of the document: name, sources, module that is linked."""
    text = (ROOT / "docs" / "CHECKPOINTS.md").read_text(encoding="utf-8")
    lines = re.findall(r"^\| (?!fact|---)(.*) \|$", text, re.MULTILINE)
    cells = [[cell.strip() for cell in re.split(r" (?<!\\)\| ", line)] for line in lines]
    return {name: (sources, re.findall(r"\((\S+?)\)", where)) for name, sources, _, where in cells}


FILE = re.compile(r"[\w.]+\.(?:json|jinja|safetensors)$")


def files_in(path):
    """The file names among the strings of a module, its docstrings apart."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    values = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    return {value for value in values if isinstance(value, str) and FILE.match(value)}


@pytest.mark.parametrize("fact", rows())
def test_the_document_names_what_the_code_reads(fact):
    sources, links = rows()[fact]
    words = re.findall(r"`([^`]+)`", sources.replace("\\|", "|"))
    read = [(ROOT / "docs" / link).resolve() for link in links]
    named = {word for word in words if FILE.match(word)}
    assert named <= set().union(*map(files_in, read))
    code = "".join(path.read_text(encoding="utf-8") for path in read)
    assert words
    assert [word for word in words if word not in code] == []


def test_the_document_names_every_file_that_is_read():
    known = set().union(*map(files_in, (ROOT / "lethe_mini" / "checkpoint").glob("*.py")))
    text = (ROOT / "docs" / "CHECKPOINTS.md").read_text(encoding="utf-8")
    assert {name for name in known if f"`{name}`" not in text} == set()
