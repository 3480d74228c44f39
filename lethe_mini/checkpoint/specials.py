"""The special tokens of a model folder: which there are, what goes around a text, what ends one.

tokenizer.json is not the only file that names them. What the others add, and which one is heard
where two disagree, follows transformers 5; docs/CHECKPOINTS.md lists it.
"""

from pathlib import Path

from tokenizers import AddedToken, Tokenizer

from ..errors import UserError, one_line, warn
from .config import first_of, read_json

FLAGS = ("single_word", "lstrip", "rstrip", "normalized")
# In this order transformers adds them, then those with other names.
NAMES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
LISTS = ("extra_special_tokens", "additional_special_tokens")


def read_optional(folder: Path, name: str) -> dict:
    """The JSON object of a file; an empty one where the folder lacks it. Raises UserError."""
    return read_json(folder / name) if (folder / name).is_file() else {}


def read_settings(folder: Path) -> dict:
    """tokenizer_config.json. Where that has no `added_tokens_decoder`, what special_tokens_map.json
    says of tokens takes the place of what it says itself."""
    settings = read_optional(folder, "tokenizer_config.json")
    if settings.get("added_tokens_decoder") is not None:
        return settings
    said = read_optional(folder, "special_tokens_map.json")
    said = {key: value for key, value in said.items() if key.endswith("_token") or key in LISTS}
    for key in ("bos_token", "eos_token"):  # the two that change what a model reads or writes
        files = {"special_tokens_map.json": said, "tokenizer_config.json": settings}
        texts = {f"{key} of {name}": _content(file.get(key)) for name, file in files.items()}
        first_of(str(folder), texts)
    return settings | {key: value for key, value in said.items() if value is not None}


def named_tokens(settings: dict) -> dict[str, str]:
    """The text of each token that has a name (`bos_token`, ...), as a chat template gets them. A
    name that is null stays undefined."""
    texts = {name: _content(value) for name, value in _named(settings).items()}
    return {name: text for name, text in texts.items() if text is not None}


def add_tokens(tokenizer: Tokenizer, folder: Path, settings: dict, vocab_size: int | None) -> None:
    """Adds the tokens that other files name beside tokenizer.json. One with an id has to get that
    id, else UserError; one without takes the next. One that the model has no embedding for is left
    out with a warning. vocab_size: how many embeddings there are; None: not known."""
    file, declared = _declared(tokenizer, folder, settings)
    absent: set[str] = set()

    def fits(token: AddedToken, id: int, file: str) -> bool:
        new = tokenizer.token_to_id(token.content) is None
        if new and vocab_size is not None and id >= vocab_size:
            absent.add(token.content)
            warn(
                f"{folder}: {file} names {token.content!r}, for which tokenizer.json has no id and "
                f"the model no embedding (vocab_size {vocab_size}); it is left out"
            )
            return False
        return True

    fitting = {id: token for id, token in declared.items() if fits(token, id, file)}
    tokenizer.add_tokens([*fitting.values()])
    for id, token in fitting.items():
        if (given := tokenizer.token_to_id(token.content)) != id:
            raise UserError(
                f"{folder}: {file} says that {token.content!r} is token {id}, but behind "
                f"tokenizer.json it is {given}; take both files from one release of the model"
            )

    for value in [*_named(settings).values(), *_listed(settings)]:
        text, added = _content(value), tokenizer.get_added_tokens_decoder()
        if not text or text in absent or text in {token.content for token in added.values()}:
            continue
        token = _added(value, special=True)
        following = 1 + max(tokenizer.get_vocab().values(), default=-1)
        if fits(token, following, "tokenizer_config.json or special_tokens_map.json"):
            tokenizer.add_tokens([token])


def encoded(tokenizer: Tokenizer, text: str, add_special_tokens: bool) -> list[int]:
    """The ids of a text. Raises UserError where the tokenizer cannot do its work."""
    try:
        return tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
    except Exception as error:  # the bindings raise nothing narrower
        reason = one_line(error)
        raise UserError(f"tokenizer.json cannot read a text ({reason}); fetch it again") from None


def check_around(tokenizer: Tokenizer, folder: Path, settings: dict) -> None:
    """What goes before and after a text that no template wrote is up to tokenizer.json alone. Warns
    where `add_bos_token` or `add_eos_token` of tokenizer_config.json would have it otherwise."""
    plain, whole = (encoded(tokenizer, "a", flag) for flag in (False, True))
    starts = range(len(whole) - len(plain) + 1)
    at = next((i for i in starts if whole[i : i + len(plain)] == plain), 0)
    around = {"bos_token": whole[:at], "eos_token": whole[at + len(plain) :]}
    for name, ids in around.items():
        text, flag = named_tokens(settings).get(name, ""), settings.get(f"add_{name}")
        if isinstance(flag, bool) and (id := tokenizer.token_to_id(text)) is not None:
            said = {f"the post-processor of tokenizer.json with {name}": id in ids}
            first_of(str(folder), {**said, f"add_{name} of tokenizer_config.json": flag})


def find_ends(tokenizer: Tokenizer, folder: Path, settings: dict) -> frozenset[int]:
    """The ids that end a text: those of generation_config.json and of config.json, or else the
    `eos_token`. config.json may hold the default of its family, which is ordinary text in another
    vocabulary: so beside generation_config.json only a special token of it counts."""
    said = []
    for name in ("generation_config.json", "config.json"):
        value = read_optional(folder, name).get("eos_token_id")
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if any(type(id) is not int for id in ids):
            raise UserError(f"{folder}: eos_token_id should be a number or a list, not {value!r}")
        said.append(set(ids))
    ends, second = said
    added = tokenizer.get_added_tokens_decoder()
    special = {id for id, token in added.items() if token.special}
    for id in sorted(second - ends):
        token = tokenizer.id_to_token(id) if 0 <= id < tokenizer.get_vocab_size() else None
        if said[0] and token is not None and id not in special:
            warn(
                f"{folder}: eos_token_id {id} of config.json does not end a text: it is {token!r} "
                f"in tokenizer.json, and generation_config.json has {sorted(said[0])}"
            )
        else:
            ends = ends | {id}
    name = named_tokens(settings).get("eos_token", "")
    eos = tokenizer.token_to_id(name)
    if eos is None or eos in ends:
        return frozenset(ends)
    if ends:
        warn(
            f"{folder}: the eos_token {name!r} ({eos}) does not end a text: eos_token_id in "
            f"generation_config.json or config.json is {sorted(ends)}; add it there if it should"
        )
    return frozenset(ends or {eos})


def _content(value) -> str | None:
    """The text of a token, which a file holds as such or as an object. None: it is no text, or
    half a character, which JSON can spell."""
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) and text.encode(errors="ignore").decode() == text else None


def _added(value: str | dict, special: bool) -> AddedToken:
    """What `tokenizers` adds, for a token that has a text."""
    flags = {key: value[key] for key in FLAGS if key in value} if isinstance(value, dict) else {}
    return AddedToken(_content(value), special=special, **{k: v is True for k, v in flags.items()})


def _named(settings: dict) -> dict:
    """Whatever has a name that ends in `_token`, and those that `extra_special_tokens` names."""
    extra = settings.get("extra_special_tokens")
    own = {key: value for key, value in settings.items() if key.endswith("_token")}
    first = {f"{name}_token": settings.get(f"{name}_token") for name in NAMES}
    return first | own | (extra if isinstance(extra, dict) else {})


def _listed(settings: dict) -> list:
    """Special tokens without a name: the first of the two lists that holds some."""
    lists = [settings[key] for key in LISTS if isinstance(settings.get(key), list)]
    return next(filter(None, lists), [])


def _declared(tokenizer: Tokenizer, folder: Path, settings: dict) -> tuple[str, dict]:
    """The tokens that come with an id: the file that says so, and {id: token}, ascending.
    `added_tokens_decoder` also changes how tokenizer.json's own tokens match; added_tokens.json,
    which is read only where there is no decoder, does not."""
    file, pairs = "added_tokens.json", []
    named = set(named_tokens(settings).values())
    if (decoder := settings.get("added_tokens_decoder")) is not None:
        file = "tokenizer_config.json (added_tokens_decoder)"
        pairs = [*decoder.items()] if isinstance(decoder, dict) else [(None, decoder)]
    else:
        named |= {_content(value) for value in _listed(settings)}
        pairs = [(id, text) for text, id in read_optional(folder, file).items()]
    known = {token.content: token for token in tokenizer.get_added_tokens_decoder().values()}
    tokens = {}
    for id, value in pairs:
        number = int(id) if str(id).isdecimal() and type(id) is not bool else None
        text = _content(value)
        if number is None or not text:
            raise UserError(
                f"{folder}: {file} should give tokens ids, not {id!r:.80} {value!r:.80}"
            )
        special = text in named or (isinstance(value, dict) and value.get("special") is True)
        own = known.get(text) if decoder is None else None
        tokens[number] = own or _added(value, special)
    return file, dict(sorted(tokens.items()))
