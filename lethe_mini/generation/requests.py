"""What `Engine.generate` is asked for, checked and turned into token ids before anything runs."""

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral

from ..cache import KVCache
from ..errors import PromptError, UserError
from ..kernels import PREFILL_CHUNK, best_size

POSITIONS = ("absolute", "compact")


@dataclass(frozen=True)
class Request:
    """One call of `generate`, checked."""

    prompts: list[list[int]]  # token ids
    limits: list[int]  # new tokens, for every prompt
    num_samples: int
    batch_size: int
    chunk: int  # tokens of a prompt that are read at once
    positions: str
    cache: KVCache | None  # to be resumed


def read_request(
    engine,
    policy,
    prompts,
    max_new_tokens,
    num_samples,
    batch_size,
    prefill_chunk,
    positions,
    cache,
    system,
    raw,
    think,
) -> Request:
    """What `Engine.generate` is asked for. Raises UserError for what cannot be done."""
    if isinstance(policy, type) or not hasattr(policy, "notes"):
        raise UserError(f"policy should be a policy such as Lethe(), not {policy!r}")
    prefill_chunk = (
        best_size(PREFILL_CHUNK, engine.device) if prefill_chunk is None else prefill_chunk
    )
    limits = _limits(prompts, max_new_tokens, num_samples, batch_size, prefill_chunk)
    sequences = len(limits) * num_samples
    _check_cache(cache, policy, positions, sequences)
    seen = 0 if cache is None else cache.next_angle(0)

    def encoded(number: int, prompt) -> list[int]:
        try:
            return encode(engine, policy, prompt, system, raw, think, seen)
        except UserError as error:
            raise PromptError(number, str(error), len(limits) == 1) from None

    ids = [encoded(number, prompt) for number, prompt in enumerate(prompts)]
    together = batch_size or sequences
    return Request(ids, limits, num_samples, together, prefill_chunk, positions, cache)


def _limits(
    prompts,
    limits: int | Sequence[int],
    num_samples: int,
    batch_size: int | None,
    prefill_chunk: int,
) -> list[int]:
    """The limit of new tokens for every prompt. Raises UserError for what cannot be."""
    if isinstance(prompts, str):
        raise UserError("prompts should be a list; give [text]")
    if not hasattr(prompts, "__len__") or isinstance(prompts, dict):
        raise UserError(f"prompts should be a list of texts, not {prompts!r}")
    if hasattr(limits, "__len__"):
        limits = list(limits)
    else:
        limits = [limits] * len(prompts)
    if len(limits) != len(prompts):
        raise UserError(f"max_new_tokens has {len(limits)} numbers for {len(prompts)} prompts")
    sizes = [("max_new_tokens", limit) for limit in limits]
    sizes += [("num_samples", num_samples), ("prefill_chunk", prefill_chunk)]
    if batch_size is not None:
        sizes.append(("batch_size", batch_size))
    for name, size in sizes:
        if not isinstance(size, Integral) or size < 1:
            raise UserError(f"{name} should be a whole number, at least 1, not {size!r}")
    return limits


def _check_cache(cache: KVCache | None, policy, positions: str, sequences: int) -> None:
    """Raises UserError where a cache cannot be resumed so, or where positions are none."""
    if positions not in POSITIONS:
        raise UserError(f"positions should be {' or '.join(POSITIONS)}, not {positions!r}")
    if cache is None:
        return
    if sequences != 1:
        raise UserError("a resumed cache takes exactly one prompt and one sample")
    layer = cache.layers[0]
    if (layer.notes, layer.compact) != (policy.notes(), positions == "compact"):
        raise UserError("the cache was made for another policy or other positions")


def encode(
    engine,
    policy,
    prompt,
    system: str | None = None,
    raw: bool = False,
    think: bool | None = None,
    seen: int = 0,
) -> list[int]:
    """One prompt's token ids. Raises UserError for one that the model or the policy cannot take;
    seen: positions that are taken before it."""
    if isinstance(prompt, str) or _are_messages(prompt):
        if engine.text is None:
            raise UserError("this engine has no tokenizer; give token ids")
        blank = isinstance(prompt, str) and not prompt.strip()
        prompt = [] if blank else engine.text.encode_prompt(prompt, system, raw, think)
    ids, config = _token_ids(prompt), engine.model.config
    if not ids:
        raise UserError("the prompt is empty; give it some text")
    if not 0 <= min(ids) <= max(ids) < config.vocab_size:
        raise UserError(f"a prompt's token ids should be from 0 to {config.vocab_size - 1}")
    room = config.max_position_embeddings - seen
    if len(ids) > room:
        raise UserError(f"the prompt has {len(ids)} tokens and the model takes {room}; cut it")
    if not seen:
        policy.check_prompt(len(ids))
    return ids


def _are_messages(prompt) -> bool:
    """Is it a list that holds a message?"""
    return isinstance(prompt, list | tuple) and any(isinstance(one, dict) for one in prompt)


def _token_ids(prompt) -> list[int]:
    """A prompt of token ids. Raises UserError for what is no list of whole numbers."""
    if isinstance(prompt, dict):
        raise UserError("a prompt should be a list of messages, not one of them; give [messages]")
    try:
        ids = list(prompt.tolist() if hasattr(prompt, "tolist") else prompt)
    except TypeError:
        raise UserError(
            f"a prompt should be a text, messages or a list of token ids, not {prompt!r}; "
            "prompts are a list, also for a single one"
        ) from None
    for id in ids:
        if not isinstance(id, Integral) or isinstance(id, bool):
            raise UserError(f"a prompt's token ids should be whole numbers, not {id!r}")
    return ids
