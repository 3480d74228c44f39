"""Options of a policy: dataclass fields that the command line reads its flags and help from."""

from dataclasses import field, fields

from .errors import UserError


def option(default, help: str, low=None, high=None, choices=None):
    """A dataclass field that is also a command-line option: its help, its closed range or words."""
    return field(
        default=default, metadata={"help": help, "low": low, "high": high, "choices": choices}
    )


def check_options(policy) -> None:
    """Raises UserError for a value of the wrong type or out of its range."""
    for spec in fields(policy):
        name, meta = spec.name, spec.metadata
        value = getattr(policy, name)
        low, high, choices = (meta.get(key) for key in ("low", "high", "choices"))
        kind = int if spec.default is None else type(spec.default)
        fits = type(value) is kind or (kind is float and type(value) is int)
        if not fits and not (value is None and spec.default is None):
            raise UserError(f"{name} should be of type {kind.__name__}, not {value!r}")
        if choices and value not in choices:
            raise UserError(f"{name} should be one of {', '.join(choices)}, not {value!r}")
        if low is not None and value is not None and not low <= value <= (high or 1e18):
            span = f"at least {low}" if high is None else f"from {low} to {high}"
            raise UserError(f"{name} should be {span}, not {value}")
