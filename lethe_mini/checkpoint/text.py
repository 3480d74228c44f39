"""Text to tokens and back: `tokenizer.json`, and the sampling that a model's makers advise.

specials.py knows the special tokens, of which several files speak, and the ids that end a text.

A prompt is a text, or messages that the chat template writes out (template.py). Text streams in
whole characters: an unfinished one waits, and the pieces add up to `decode` of all ids.
`tokenizers.DecodeStream` promises the same, but it raises or loses text where byte-fallback tokens
make no valid UTF-8.
"""

import re
import sys
from pathlib import Path

from tokenizers import Tokenizer

from ..errors import UserError, one_line
from .specials import (
    add_tokens,
    check_around,
    encoded,
    find_ends,
    named_tokens,
    read_optional,
    read_settings,
)
from .template import ChatTemplate, check_messages, find_templates

MOST = sys.float_info.max  # a whole number in JSON may be larger
# What generation_config.json may say about sampling, in which range and in words.
NUMBERS = {
    "temperature": (lambda x: 0 <= x <= MOST, "a number, 0 (greedy) or above"),
    "top_p": (lambda x: 0 < x <= 1, "a number above 0 and at most 1"),
    "top_k": (lambda x: x >= 0 and type(x) is int, "a whole number, 0 (off) or above"),
    "repetition_penalty": (lambda x: 0 < x <= MOST, "a number above 0"),
}


class Text:
    """The tokenizer, the chat template, the end-of-text ids and the sampling of one model folder.

    sampling: the fields of Sampling that generation_config.json decides, none where it is greedy.
    repetition_penalty: what it asks for beside them and nobody applies; 1 is none.
    """

    def __init__(self, folder: Path):
        folder = Path(folder)
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise UserError(f"{path} is missing: a model folder needs tokenizer.json")
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the bindings raise nothing narrower
            raise UserError(f"{path} is no tokenizer ({one_line(error)}); fetch it again") from None
        # Some files carry the settings of their training run: a prompt is never cut or filled up.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

        settings = read_settings(folder)
        size = read_optional(folder, "config.json").get("vocab_size")
        add_tokens(self._tokenizer, folder, settings, size if type(size) is int else None)
        check_around(self._tokenizer, folder, settings)
        specials = named_tokens(settings)
        self.template = ChatTemplate(find_templates(folder, settings), specials)
        self.has_template = bool(self.template.named)
        self.eos_ids = find_ends(self._tokenizer, folder, settings)
        generation = read_optional(folder, "generation_config.json")
        self.sampling = _sampling(folder / "generation_config.json", generation)
        self.repetition_penalty = self.sampling.pop("repetition_penalty", 1)

        added = self._tokenizer.get_added_tokens_decoder()
        self._skipped = frozenset(id for id, token in added.items() if token.special)
        # `<0x41>` stands for the byte 0x41 only if the decoder says so: Llama 2's does, Qwen's not
        decoder = self._tokenizer.decoder
        vocab = self._tokenizer.get_vocab()
        falls_back = decoder is not None and decoder.decode(["<0x41>"]) == "A"
        self._bytes = frozenset(
            id for token, id in vocab.items() if falls_back and re.fullmatch("<0x..>", token)
        )

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError:
            raise UserError("the text is not valid Unicode; save it as UTF-8") from None
        return encoded(self._tokenizer, text, add_special_tokens)

    def encode_end(self, text: str, end: str) -> list[int]:
        """The ids of `end`, as they are in those of `text`, which ends with it: some tokenizers put
        a space before whatever they begin with."""
        start = self.encode(text[: len(text) - len(end)], add_special_tokens=False)
        ids = self.encode(text, add_special_tokens=False)
        # A token over the border would be read a second time in part.
        return ids[len(start) :] if ids[: len(start)] == start else self.encode(end, False)

    def decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def choose_template(self, name: str) -> None:
        """From now on the chat template of this name. Raises UserError where there is none."""
        self.template.choose(name)

    def chat(self, messages: list[dict], think: bool | None = None) -> str:
        """`messages` through the chat template (template.py). Raises UserError."""
        return self.template.chat(messages, think)

    def encode_prompt(
        self,
        prompt: str | list[dict],
        system: str | None = None,
        raw: bool = False,
        think: bool | None = None,
    ) -> list[int]:
        """The ids of a prompt: of messages, or of a text. A text goes through the chat template
        unless `raw` or the model has none. Raises UserError for what cannot be."""
        is_text = isinstance(prompt, str)
        messages = [{"role": "user", "content": prompt}] if is_text else [*prompt]
        check_messages(messages, system)
        if raw or not self.has_template:
            why = "--raw leaves it out" if raw else "this model has none"
            for given, what, mend in (
                (not is_text, "messages need", "give a text instead"),
                (system is not None, "a system text needs", "drop the system text"),
                (think is not None, "--think and --no-think need", "leave them out"),
            ):
                if given:
                    raise UserError(f"{what} a chat template, and {why}; {mend}")
            ids = self.encode(prompt)
        else:
            if system is not None:
                messages = [{"role": "system", "content": system}, *messages]
            # The template writes the special tokens itself; a second BOS would harm.
            ids = self.encode(self.chat(messages, think), add_special_tokens=False)
        if not ids:
            raise UserError("the prompt is empty; give it some text")
        return ids

    def stream(self) -> "Stream":
        return Stream(self)

    def pieces(self, ids: list[int]) -> list[str]:
        """What each token adds to the text; special ones by name. A character that several make
        belongs to the last of them."""
        stream, name = self.stream(), self._tokenizer.id_to_token
        pieces = [name(id) if id in self._skipped else stream.push(id) for id in ids]
        return [*pieces[:-1], pieces[-1] + stream.flush()]


class Stream:
    """Takes ids and gives whole characters, each as soon as no later token can change it.

    With every token only a window of ids is decoded again. The window's first tokens are context: a
    decoder strips the space before the first one, so only the text behind them counts.
    """

    KEEP, TRIM = 8, 32  # ids of context, at least 4 bytes in all decoders; window that is cut

    def __init__(self, text: Text):
        self._text = text
        self._ids: list[int] = []
        self._sent = ""  # what of the window's text has been given out

    def push(self, id: int) -> str:
        """The characters that `id` completes, often none."""
        text = self._text
        if id in text._skipped or text._tokenizer.id_to_token(id) is None:
            return ""
        self._ids.append(id)
        # A run of byte-fallback tokens is decoded as a whole. A bad byte at its end turns all of it
        # into U+FFFD, so it waits for its end.
        return "" if id in text._bytes else self._advance()

    def flush(self) -> str:
        """What still waits, with U+FFFD for bytes that never became a character."""
        decoded = self._text.decode(self._ids)
        rest = decoded[len(self._sent) :]
        self._ids, self._sent = [], ""
        return rest

    def _advance(self) -> str:
        stable = self._stable()
        new, self._sent = stable[len(self._sent) :], stable
        if len(self._ids) > self.TRIM:
            self._ids = self._ids[-self.KEEP :]
            self._sent = self._stable()
        return new

    def _stable(self) -> str:
        """The window's text, less an unfinished character: that shows as one U+FFFD at the end."""
        decoded = self._text.decode(self._ids)
        return decoded[:-1] if decoded.endswith("\ufffd") else decoded


def _sampling(path: Path, generation: dict) -> dict:
    """What generation_config.json says about sampling; nothing where it does not ask for it.
    null is as good as absent. Raises UserError for a value that makes no sense."""
    wanted = generation.get("do_sample")
    if wanted is not None and type(wanted) is not bool:
        raise UserError(f"{path}: do_sample should be true or false, not {wanted!r:.80}")
    if not wanted:
        return {}
    said = {name: generation.get(name) for name in NUMBERS if generation.get(name) is not None}
    for name, value in said.items():
        fits, words = NUMBERS[name]
        if type(value) not in (int, float) or not fits(value):
            raise UserError(f"{path}: {name} should be {words}, not {value!r:.80}")
    return {"temperature": 1.0, **said}
