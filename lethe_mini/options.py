"""Options of a policy: dataclass fields that the command line reads its flags and help from."""

from dataclasses import field, fields

from .errors import UserError


def option(default, help: str, low=None, high=None, choices: dict[str, bool] | None = None):
    """A dataclass field that is also a command-line option: its help, and its closed range or its
    words, each with whether it makes sense where there is no budget."""
    limits = {"low": low, "high": high, "choices": choices}
    return field(default=default, metadata={"help": help, **limits})


def check_options(policy) -> None:
    """Raises UserError for a value of the wrong type, out of its range, or that needs a budget."""
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
        if policy.budget is None and choices and not choices[value]:
            raise UserError(f"{name} {value} needs a budget; give one (--budget)")


def check_room(budget: int | None, need: int, prompt: bool) -> None:
    """Raises UserError if a budget is less than what is always kept, with the prompt or without."""
    if budget is not None and budget < need:
        kept, mend = "sinks and recent tokens", "raise --budget"
        if prompt:
            kept, mend = f"the prompt, {kept}", f"{mend} or use --no-protect-prompt"
        raise UserError(
            f"budget {budget} is too small for {kept}, always kept: {need} tokens; {mend}"
        )
