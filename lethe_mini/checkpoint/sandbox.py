"""Where a chat template runs: Jinja with the names that transformers gives it, and three limits.

A template is a program by a stranger. Jinja's immutable sandbox keeps it from Python's insides.
Here it also has `SECONDS` of this thread's time, which a trace function watches line by line, and
room for so many characters. A trace sees no line within a single operation. So each one that can
make much of little (an operator, a call, a filter) is measured before it runs, and what it makes
is counted.
"""

import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from functools import wraps
from types import CodeType

from jinja2 import TemplateError, nodes, pass_context, pass_environment
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import do_sum
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

SECONDS = 0.8  # of processor time, so that a busy machine refuses no template
ROOM = 1 << 20  # characters of one value, beside twice those of the messages
TOTAL = 64  # times the room: all that is ever made, and what a single operation may come to
BITS = 4096  # of an integer
# Unknown here, so an error names them: they cost more than they are worth to a prompt.
REFUSED = ("pprint", "random", "striptags", "urlize", "wordwrap", "xmlattr")
# Filters that only pass on what is there: they are not measured, since loops use them often.
LIGHT = (
    "attr", "count", "d", "default", "dictsort", "first", "groupby", "items", "last", "length",
    "map", "max", "min", "reject", "rejectattr", "reverse", "select", "selectattr", "sort",
    "truncate", "unique",
)  # fmt: skip
BRACES = re.compile(r"\{[^{}]*(\{|\d{4})")  # a width within a width, or one of four digits
PERCENT = re.compile(r"%[^%a-zA-Z]*(\*|\d{4})")


class TooMuch(BaseException):
    """A template exceeds a limit. Nothing that Jinja catches, so it always ends the run."""


class Sandbox(ImmutableSandboxedEnvironment):
    """One run of a template, or the compilation of one. room: characters that a value may have."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self, room: int = ROOM):
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, loopcontrols],
            finalize=_write,
            optimized=False,  # nothing of a template runs while it is compiled
        )
        self.room, self.made, self.lines, self.end = room, 0, 0, 0.0
        del self.globals["lipsum"]
        self.globals |= {"raise_exception": _raise, "strftime_now": _now}
        self.globals |= {"dict": _Dict(), "namespace": _Namespace}
        self.filters |= {"tojson": _tojson, "sum": _sum}
        self.filters = {
            name: self._measured(name, function)
            for name, function in self.filters.items()
            if name not in REFUSED
        } | {"(bounded)": self._bounded, "(joined)": self._joined}

    def compiled(self, source: str) -> CodeType:
        """The template as code, for the sandbox of each of its runs."""
        return self.compile(_Marked().visit(self.parse(source)))

    def run(self, code: CodeType, /, **names) -> str:
        """What the template writes. Raises TooMuch, and whatever else a program can raise."""
        template, text, size = self.template_class.from_code(self, code, self.globals), [], 0
        with self._watched():
            for piece in template.generate(**names):
                text.append(piece)
                size += len(piece)
                self._check_room(size)
        return "".join(text)

    # -- time --------------------------------------------------------------------------------------

    @contextmanager
    def _watched(self) -> Iterator[None]:
        before, self.end = sys.gettrace(), time.thread_time() + SECONDS
        sys.settrace(self._trace)
        try:
            yield
        finally:
            sys.settrace(before)

    def _trace(self, frame, event, arg) -> Callable | None:
        if frame.f_code.co_filename == __file__:
            return None
        self.lines += 1
        if self.lines % 32 == 0:  # the clock takes longer than most lines
            self._check_time()
        return self._trace

    def _check_time(self) -> None:
        if self.end and time.thread_time() > self.end:
            raise TooMuch("it takes too long")

    # -- room --------------------------------------------------------------------------------------

    def _check_room(self, size: int, times: int = 1) -> None:
        if size > times * self.room:
            raise TooMuch(f"it makes a text of more than {self.room / 1e6:.1f} MB")

    def weigh(self, *values) -> int:
        """Characters of the values, and 8 for an item, each as often as it stands in them."""
        size, todo = 0, list(values)
        for value in todo:
            if isinstance(value, str | bytes):
                size += len(value)
            elif isinstance(value, list | tuple):
                size += 8 * len(value)
                todo += value
            elif isinstance(value, dict):
                size += 8 * len(value)
                todo += [*value, *value.values()]
            elif isinstance(value, int) and value.bit_length() > BITS:
                raise TooMuch(f"it makes an integer of more than {BITS} bits")
            self._check_room(size)
        return size

    def count(self, value):
        """The value, counted as made."""
        self._check_time()
        if isinstance(value, str | bytes | list | tuple | dict):
            self._check_room(len(value))
            self.made += len(value)
            self._check_room(self.made, TOTAL)
        elif isinstance(value, int):
            self.weigh(value)
        return value

    def _measure(self, name: str, *values) -> None:
        """Raises TooMuch where an operation on these values could make too much of them."""
        self._check_time()
        wide = {"%": PERCENT, "format": BRACES, "format_map": BRACES}.get(name)
        if wide and isinstance(values[0], str) and wide.search(values[0].replace("{{", "")):
            raise TooMuch("it asks for a very wide column")
        product = 1
        for value in values:
            size = self.weigh(value)
            number = isinstance(value, int) and not isinstance(value, bool)
            product *= max(1, abs(value) if number else size)
        self._check_room(product, TOTAL)

    def call_binop(self, context, operator: str, left, right):
        numbers = isinstance(left, int | float) and isinstance(right, int | float)
        if operator == "**" and isinstance(left, int) and isinstance(right, int):
            if left.bit_length() * abs(right) > BITS:
                raise TooMuch(f"it makes an integer of more than {BITS} bits")
        elif operator in "*%" and not numbers:
            self._measure(operator, left, right)
        return self.count(super().call_binop(context, operator, left, right))

    def call(self, context, function, /, *args, **kwargs):
        receiver = getattr(function, "__self__", None)
        if isinstance(receiver, str | bytes | int):
            if function.__name__ == "join":
                args = [_all_of(value) for value in args]
            self._measure(function.__name__, receiver, *args, *kwargs.values())
        else:
            self.weigh(*args, *kwargs.values())
        return self.count(super().call(context, function, *args, **kwargs))

    def wrap_str_format(self, value) -> Callable | None:
        function = super().wrap_str_format(value)
        if function is not None:
            function.__self__ = value.__self__  # measured as other methods of a string are
        return function

    def _measured(self, name: str, function: Callable) -> Callable:
        """A filter that is measured; wraps keeps what Jinja reads from a function."""
        if name in LIGHT:
            return function
        kind = "%" if name == "format" else name

        @wraps(function)
        def measured(*args, **kwargs):
            if name == "join":
                args = [_all_of(value) for value in args]
            first = 1 if hasattr(function, "jinja_pass_arg") else 0
            self._measure(kind, *args[first:], *kwargs.values())
            return self.count(function(*args, **kwargs))

        return measured

    def _bounded(self, value):
        """A list, tuple or dict that the template writes out. Nested again and again, small ones
        would come to one that takes for ever to compare or to print."""
        self.weigh(value)
        return self.count(value)

    def _joined(self, values: tuple) -> str:
        """What `~` joins."""
        self.weigh(values)
        return self.count("".join(map(str, values)))


class _Marked(NodeTransformer):
    """Sends what no hook of Jinja's sandbox sees through a filter: text, `~`, lists, dicts."""

    def visit_TemplateData(self, node):
        return nodes.Const(node.data, lineno=node.lineno)

    def visit_Concat(self, node):
        self.generic_visit(node)
        parts = nodes.Tuple(node.nodes, "load", lineno=node.lineno)
        return nodes.Filter(parts, "(joined)", [], [], None, None, lineno=node.lineno)

    def visit_List(self, node):
        self.generic_visit(node)
        if getattr(node, "ctx", "load") != "load":  # (a, b) that a loop or `set` fills
            return node
        return nodes.Filter(node, "(bounded)", [], [], None, None, lineno=node.lineno)

    visit_Tuple = visit_Dict = visit_List

    def visit_ScopedEvalContextModifier(self, node):
        raise TemplateError("the tag autoescape is not known here: a prompt is no HTML")


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}` marks for training what the assistant wrote. What
    stands inside is rendered, as in the block that transformers makes of it."""

    tags = frozenset({"generation"})

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("inside"), [], [], body, lineno=line)

    def inside(self, caller) -> str:
        return caller()


class _Dict:
    """`dict` as a function, not as the class, which has more than a template should reach."""

    def __call__(self, *args, **kwargs) -> dict:
        return dict(*args, **kwargs)

    def fromkeys(self, *args) -> dict:
        return dict.fromkeys(*args)


class _Namespace(Namespace):
    """Jinja's, without names that begin with an underscore."""

    def __init__(*args, **kwargs):  # a name may be `self`
        self, *args = args
        names = dict(*args, **kwargs)
        for name in names:
            _check_name(name)
        Namespace.__init__(self, names)

    def __setitem__(self, name: str, value) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name) -> None:
    if str(name).startswith("_"):
        raise SecurityError(f"a namespace has no {name}; no name in it begins with an underscore")


@pass_context  # which is not there while Jinja compiles, so it runs nothing then
def _write(context, value) -> str:
    """What is written for a value, also into a variable or by a macro."""
    context.environment.weigh(value)
    return context.environment.count(str(value))


@pass_environment
def _sum(environment: Sandbox, values, attribute=None, start=0):
    if not isinstance(start, int | float):  # lists would be copied again and again
        raise TemplateError("the filter sum adds numbers")
    return do_sum(environment, values, attribute, start)


def _all_of(values):
    return list(values) if isinstance(values, Iterator | range) else values


def _raise(message):
    raise TemplateError(message)


def _now(form):
    return datetime.now().strftime(form)


def _tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    """Jinja's own escapes for HTML, which would change the prompt."""
    options = {"indent": indent, "separators": separators, "sort_keys": sort_keys}
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)
