"""The tokenizer of a GGUF file as tokenizer.json, with the two small files that go with it.

Byte-level BPE (GPT-2, Llama 3, Qwen2) and SentencePiece BPE (Llama 2, Mistral). Another
pre-tokenizer raises an error that names it.
"""

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, processors
from tokenizers import pre_tokenizers as cut

from ..errors import UserError, one_line

NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4  # tokenizer.ggml.token_type
# A file may name one end token, and end a turn of its chat with another: these end a text wherever
# they are in the vocabulary and no ordinary text.
ENDS = (
    "<|endoftext|>", "<|end_of_text|>", "<｜end▁of▁sentence｜>", "</s>", "<eos>", "[EOS]",
    "<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|end_of_turn|>",
    "<end_of_utterance>", "<EOT>", "[EOT]", "<|return|>", "<|call|>",
)  # fmt: skip
# How Llama 3 and Qwen2 cut text before BPE; they differ in how many digits stay together.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}DIGITS"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT2 = [cut.ByteLevel(add_prefix_space=False)]
BYTES = cut.ByteLevel(add_prefix_space=False, use_regex=False)
LLAMA3 = [cut.Split(Regex(SPLIT.replace("DIGITS", "{1,3}")), "isolated"), BYTES]
QWEN2 = [cut.Split(Regex(SPLIT.replace("DIGITS", "")), "isolated"), BYTES]
PRE_TOKENIZERS = {  # tokenizer.ggml.pre
    "default": GPT2,
    "gpt-2": GPT2,
    # Digits first: the blank line before "1." then stays one piece, as the model was trained.
    "smollm": [cut.Digits(individual_digits=True), *GPT2],
    "llama-bpe": LLAMA3,
    "llama3": LLAMA3,
    "qwen2": QWEN2,
    "deepseek-r1-qwen": QWEN2,
}


def make_tokenizer(source, vocab_size: int) -> tuple[Tokenizer, dict[str, dict]]:
    """The tokenizer, and {file name: content} of the two files that go with it. source: the file, a
    convert_gguf.Source. Raises UserError."""
    tokens = source.get("tokenizer.ggml.tokens", list)
    types = source.get("tokenizer.ggml.token_type", list)
    if len(types) != len(tokens) or len(tokens) > vocab_size:
        counts = f"{len(tokens)} tokens, {len(types)} token types and {vocab_size} embeddings"
        raise UserError(f"{counts} do not fit together; take another GGUF of the model")
    build = {"gpt2": byte_level, "llama": sentencepiece}
    if (model := source.get("tokenizer.ggml.model", str)) not in build:
        raise UserError(f"tokenizer {model!r} is not supported, only gpt2 and llama")
    keys = {
        "bos": "bos",
        "eos": "eos",
        "eot": "eot",
        "eom": "eom",
        "unknown": "unk",
        "padding": "pad",
    }
    ids = {
        name: source.get(f"tokenizer.ggml.{key}_token_id", int, None) for key, name in keys.items()
    }
    ids = {name: i for name, i in ids.items() if i is not None}
    for name, i in ids.items():
        if not 0 <= i < len(tokens):
            raise UserError(f"the {name} token {i} is outside the vocabulary of {len(tokens)}")

    try:
        tokenizer, add_bos = build[model](source, tokens, types, ids)
        ends = end_ids(tokens, types, ids)
        special = {i for i, kind in enumerate(types) if kind in (UNKNOWN, CONTROL)} | ends
        special |= {ids["bos"]} if "bos" in ids else set()
        whole = [i for i, kind in enumerate(types) if i in special or kind == USER_DEFINED]
        tokenizer.add_tokens(
            [AddedToken(tokens[i], special=i in special, normalized=False) for i in whole]
        )
        add_bos = "bos" in ids and source.get("tokenizer.ggml.add_bos_token", bool, add_bos)
        if add_bos:  # add_eos_token is left out: a prompt that is to go on never ends with it
            bos = tokens[ids["bos"]]
            tokenizer.post_processor = processors.TemplateProcessing(
                single=[bos, "$A"], pair=[bos, "$A", "$B"], special_tokens=[(bos, ids["bos"])]
            )
    except UserError:
        raise
    except Exception as error:  # what `tokenizers` raises has no narrower type
        raise UserError(
            f"the tokenizer is broken ({one_line(error, 80)}); take another GGUF"
        ) from None

    config = {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": add_bos}
    config |= {f"{n}_token": tokens[ids[n]] for n in ("bos", "eos", "unk", "pad") if n in ids}
    if (template := source.get("tokenizer.chat_template", str, None)) is not None:
        config["chat_template"] = template
    generation = {"eos_token_id": sorted(ends) or None}
    return tokenizer, {"tokenizer_config.json": config, "generation_config.json": generation}


def end_ids(tokens: list, types: list, ids: dict) -> set[int]:
    """The ids that end a text: those of the file's metadata, and those known by name. Where there
    is a `<|return|>`, `<|end|>` only ends a part of the reply."""
    names = set(ENDS) - ({"<|end|>"} if "<|return|>" in tokens else set())
    kinds = (CONTROL, USER_DEFINED)
    known = {i for i, one in enumerate(tokens) if one in names and types[i] in kinds}
    return known | {ids[name] for name in ("eos", "eot", "eom") if name in ids}


def byte_level(source, tokens: list, types: list, ids: dict) -> tuple[Tokenizer, bool]:
    """Byte-level BPE (GPT-2 and after), and whether BOS goes first unless the file says."""
    if (name := source.get("tokenizer.ggml.pre", str)) not in PRE_TOKENIZERS:
        known = ", ".join(PRE_TOKENIZERS)
        raise UserError(f"pre-tokenizer {name!r} is not supported, only {known}")
    cuts = PRE_TOKENIZERS[name]
    merges = [tuple(merge.split(" ")) for merge in source.get("tokenizer.ggml.merges", list)]
    vocab = {token: i for i, token in enumerate(tokens)}
    # Llama 3 takes a piece that is a token whole, even where no merges lead there.
    tokenizer = Tokenizer(models.BPE(vocab, merges, ignore_merges=cuts is LLAMA3))
    if cuts is QWEN2:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = cut.Sequence(cuts)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, cuts is LLAMA3


def sentencepiece(source, tokens: list, types: list, ids: dict) -> tuple[Tokenizer, bool]:
    """SentencePiece BPE with byte fallback (Llama 2); BOS goes first unless the file says."""
    scores = source.get("tokenizer.ggml.scores", list)
    vocab = {token: i for i, token in enumerate(tokens)}
    # SentencePiece joins the two neighbours whose union scores best: as a list of merges, the
    # unions by falling score. Only normal tokens are made by joining.
    normal = {token: i for token, i in vocab.items() if types[i] == NORMAL}
    merges = [
        (-scores[i], -at, token[:at], token[at:])
        for token, i in normal.items()
        for at in range(1, len(token))
        if token[:at] in normal and token[at:] in normal
    ]
    merges = [(left, right) for *_, left, right in sorted(merges)]
    unknown = tokens[ids["unk"]] if "unk" in ids else None
    model = models.BPE(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    steps = [normalizers.Replace(" ", "▁")]
    back = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if source.get("tokenizer.ggml.add_space_prefix", bool, True):
        steps = [normalizers.Prepend("▁"), *steps]
        back = [*back, decoders.Strip(" ", 1, 0)]
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.decoder = decoders.Sequence(back)
    return tokenizer, True
