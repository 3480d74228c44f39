"""Chat templates: from messages to the text that a model was trained to read.

A template is a program from a checkpoint, which may bring several under different names. It runs in
a sandbox of its own (sandbox.py), and any error in it becomes a `UserError`. A last message of the
assistant is continued.
"""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from types import CodeType

from jinja2.meta import find_undeclared_variables

from ..errors import UserError, one_line
from .config import read_json
from .sandbox import ROOM, Sandbox, TooMuch

MARK = "(the text goes on here) "  # its last space shows whether a template trims a message
MEND = "a text can go without it (--raw)"
REASONING = ("reasoning_content", "thinking", "reasoning")  # keys of a thought, usual one first


class ChatTemplate:
    """named: the programs of a model by name, none where it has no template; the one called default
    is used unless another is chosen. specials: the special tokens that they may name."""

    def __init__(self, named: dict[str, str], specials: dict[str, str]):
        self.named, self.specials = named, specials
        self.name: str | None = None  # what `choose` chose

    def choose(self, name: str) -> None:
        """From now on the template of this name. Raises UserError where there is none."""
        if name not in self.named:
            known = f"its templates are {_list(self.named)}" if self.named else "it has none at all"
            raise UserError(f"this model has no chat template {name!r}; {known}")
        self.name = name
        for derived in ("_code", "_reads"):
            self.__dict__.pop(derived, None)

    @property
    def source(self) -> str:
        """The program. Raises UserError where the model has none, or several and none is chosen."""
        if not self.named:
            raise UserError("this model has no chat template; use --raw, without a system text")
        name = self.name or "default"
        if name not in self.named:
            raise UserError(
                f"this model's chat templates are {_list(self.named)}, and none is the default; "
                "choose one with --template"
            )
        return self.named[name]

    @cached_property
    def _code(self) -> CodeType:
        return Sandbox().compiled(self.source)

    @cached_property
    def _reads(self) -> set[str]:
        """The names that the program expects to be given."""
        return find_undeclared_variables(Sandbox().parse(self.source if self.named else ""))

    def chat(self, messages: list[dict], think: bool | None = None) -> str:
        """`messages`, each with role and content, as the model was trained to see them, up to where
        its reply begins. A last message of the assistant is the beginning of that reply. think:
        what the template is told about thinking; None: nothing."""
        if not messages or messages[-1].get("role") != "assistant":
            return self._render(messages, True, think)
        *before, last = messages
        text = last["content"]
        thinks = text.rfind("<think>") > text.rfind("</think>")  # in a thought that is still open
        if not thinks:  # as transformers does it (continue_final_message)
            marked = self._render([*before, {**last, "content": text + MARK}], False, think)
            head, mark, rest = marked.rpartition(MARK.rstrip())
            if mark and text.strip() in marked:
                return head if rest.startswith(" ") else head.rstrip()
        # The template would write an empty thought before the open one, or another text than this.
        # So the text follows the head of a reply, which may open a thought, or an empty one.
        head = self._render(before, True, think)
        if "<think>" in text:
            head = re.sub(r"<think>\s*(</think>\s*)?\Z", "", head)
        return head + text

    def follows(self, messages: list[dict], think: bool | None, read: str) -> tuple[str, str]:
        """The whole conversation, and the end of it that comes after its last reply. messages: the
        last two are that reply and what is said to it; read: all that has been read, the reply too,
        which is most often how the conversation begins. Raises UserError where no reply is left."""
        whole = self.chat(messages, think)
        if whole.startswith(read):
            return whole, whole[len(read) :]
        *before, reply, said = messages
        mark = MARK.strip()
        while any(mark in message["content"] for message in messages):
            mark += "."
        marked = {**reply, "content": reply["content"] + mark}
        head, found, rest = self.chat([*before, marked, said], think).rpartition(mark)
        if not found:
            raise UserError("the chat template leaves out replies, so it takes a single turn")
        return head + rest, rest

    def _render(self, messages: list[dict], reply: bool, think: bool | None) -> str:
        """What the template makes of the messages; reply: with the head of a reply at the end."""
        self.check_think(think)
        names = {"add_generation_prompt": reply, "tools": None, "documents": None}
        if think is not None:
            names["enable_thinking"] = think
        with _template_errors():
            messages = _plain(messages)
            sandbox = Sandbox(ROOM + 2 * len(json.dumps(messages)))
            return sandbox.run(self._code, messages=messages, **self.specials, **names)

    def check_think(self, think: bool | None) -> None:
        """Raises UserError where the chat template cannot be told whether to think."""
        if think is None:
            return
        if type(think) is not bool:
            raise UserError(f"think should be True, False or None, not {think!r:.80}")
        with _template_errors():
            knows = "enable_thinking" in self._reads
        if not knows:
            raise UserError("this model has no switch for thinking; leave out --think, --no-think")


def check_messages(messages: list, system: str | None = None) -> None:
    """Raises UserError for what are no messages, or where a system text would be their second."""
    if not messages:
        raise UserError("the list of messages is empty; give it a message")
    for message in messages:
        if not isinstance(message, dict):
            raise UserError(f"a message should have role and content, not be {message!r:.80}")
        for key in ("role", "content"):
            if key not in message:
                raise UserError(f"a message has no {key}; give it role and content, two strings")
            if not isinstance(message[key], str):
                raise UserError(f"a message's {key} should be a string, not {message[key]!r:.80}")
    if system is not None and any(message["role"] == "system" for message in messages):
        raise UserError("the messages have a system text already; give one of the two")


def find_templates(folder: Path, settings: dict) -> dict[str, str]:
    """The templates of a model folder by name, in the order of transformers: files of their own
    hide those of its tokenizer_config.json, which are the settings. chat_template.json, which only
    processors of pictures read there, comes last. Raises UserError for what is no template."""
    named = {}
    paths = {"default": folder / "chat_template.jinja"}
    paths |= {path.stem: path for path in sorted(folder.glob("additional_chat_templates/*.jinja"))}
    for name, path in paths.items():
        if path.is_file():
            try:
                named[name] = path.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                reason = one_line(error)
                raise UserError(f"{path} cannot be read ({reason}); fetch it again") from None
    if named:
        return named
    file, said = "tokenizer_config.json", settings.get("chat_template")
    if said is None and (folder / "chat_template.json").is_file():
        file = "chat_template.json"
        said = read_json(folder / file).get("chat_template")
    if said is None:
        return {}
    if isinstance(said, list):  # [{"name": "default", "template": ...}, ...
        said = {one.get("name"): one.get("template") for one in said if isinstance(one, dict)}
    named = said if isinstance(said, dict) else {"default": said}
    if not all(isinstance(word, str) for pair in named.items() for word in pair):
        raise UserError(f"{folder}: chat_template in {file} should be a string, or named strings")
    return named


def _plain(messages: list[dict]) -> list[dict]:
    """The messages as a template gets them: JSON alone, since methods of other objects could do
    anything; without keys that are None; a thought under all names that templates know."""
    text = json.dumps(messages, default=lambda value: f"<{type(value).__name__}>")
    plain = [{k: v for k, v in one.items() if v is not None} for one in json.loads(text)]
    for message in plain:
        thought = next((message[key] for key in REASONING if key in message), None)
        if thought is not None:
            message.setdefault("thinking", thought)
            message["reasoning_content"] = thought
    return plain


@contextmanager
def _template_errors() -> Iterator[None]:
    """Around a template's run: it can raise anything that Python can, which becomes a UserError."""
    try:
        yield
    except UserError:
        raise
    except TooMuch as error:
        raise UserError(f"the chat template is stopped: {error}; {MEND}") from None
    except Exception as error:
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise UserError(f"the chat template failed ({reason}); {MEND}") from None


def _list(names) -> str:
    return ", ".join(sorted(map(repr, names)))
