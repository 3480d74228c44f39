"""Chat templates: from messages to the text that a model was trained to read.

A template is a program from a checkpoint. It runs in Jinja's immutable sandbox, and any error in it
becomes a `UserError`. A last message of the assistant is continued.
"""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from jinja2 import TemplateError
from jinja2.ext import loopcontrols
from jinja2.meta import find_undeclared_variables
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ..errors import UserError

MARK = "(the text goes on here) "  # its last space shows whether a template trims a message


class ChatTemplate:
    """source: the program (None: the model has none); specials: the special tokens it may name."""

    def __init__(self, source: str | None, specials: dict[str, str]):
        self.source, self.specials = source, specials

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

    def _render(self, messages: list[dict], reply: bool, think: bool | None) -> str:
        """What the template makes of the messages; reply: with the head of a reply at the end."""
        if self.source is None:
            raise UserError("this model has no chat template; use --raw, without a system text")
        self.check_think(think)
        context = {"add_generation_prompt": reply, "tools": None, "documents": None}
        if think is not None:
            context["enable_thinking"] = think
        with _template_errors():
            template = _environment().from_string(self.source)
            return template.render(messages=messages, **context, **self.specials)

    def check_think(self, think: bool | None) -> None:
        """Raises UserError where the chat template cannot be told whether to think."""
        if think is None:
            return
        if type(think) is not bool:
            raise UserError(f"think should be True, False or None, not {think!r:.80}")
        with _template_errors():
            names = find_undeclared_variables(_environment().parse(self.source or ""))
        if "enable_thinking" not in names:
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


def find_template(folder: Path, settings: dict) -> str | None:
    """The template of a model folder; None: it has none. settings: its tokenizer_config.json."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path} cannot be read ({one_line(error)}); fetch it again") from None
    template = settings.get("chat_template")
    if isinstance(template, list):  # [{"name": "default", "template": ...}, ...
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = named.get("default")
    if template is not None and not isinstance(template, str):
        raise UserError(f"{folder}: chat_template in tokenizer_config.json should be a string")
    return template


def _environment() -> ImmutableSandboxedEnvironment:
    """What templates on the hub expect: the names and whitespace rules of transformers."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )

    def raise_exception(message):
        raise TemplateError(message)

    def tojson(value, **options):  # Jinja's own escapes for HTML, which would change the prompt
        return json.dumps(value, **{"ensure_ascii": False, **options})

    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


@contextmanager
def _template_errors() -> Iterator[None]:
    """Around a template's run: it can raise anything that Python can, which becomes a UserError."""
    try:
        yield
    except Exception as error:
        raise UserError(
            f"the chat template failed ({type(error).__name__}: {one_line(error)}); "
            "a text can go without it (--raw)"
        ) from None


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
