"""What `Engine.generate` is asked for, checked and turned into token ids before anything runs."""

from collections.abc import Sequence

from ..cache import KVCache
from ..errors import UserError
from ..policy import Policy

POSITIONS = ("absolute", "compact")


def encode_prompts(
    engine, prompts, policy: Policy, system: str | None, raw: bool, cache: KVCache | None
) -> list[list[int]]:
    """Every prompt's token ids. Raises UserError for one that the model or the policy cannot take;
    cache: what has been read before it, if anything."""
    if isinstance(prompts, str):
        raise UserError("prompts should be a list; give [text]")
    seen = 0 if cache is None else cache.next_angle(0)
    encoded, config = [], engine.model.config
    for prompt in prompts:
        if isinstance(prompt, str):
            if engine.text is None:
                raise UserError("this engine has no tokenizer; give token ids")
            prompt = engine.text.encode_prompt(prompt, system, raw) if prompt.strip() else []
        ids = list(prompt)
        if not ids:
            raise UserError("the prompt is empty; give it some text")
        if not 0 <= min(ids) <= max(ids) < config.vocab_size:
            raise UserError(f"a prompt's token ids should be from 0 to {config.vocab_size - 1}")
        room = config.max_position_embeddings - seen
        if len(ids) > room:
            raise UserError(f"the prompt has {len(ids)} tokens and the model takes {room}; cut it")
        if not seen:
            policy.check(len(ids))
        encoded.append(ids)
    return encoded


def check_request(
    prompts,
    limits: int | Sequence[int],
    num_samples: int,
    batch_size: int | None,
    prefill_chunk: int,
    positions: str,
    cache: KVCache | None,
    policy: Policy,
) -> list[int]:
    """The limit of new tokens for every prompt. Raises UserError for what cannot be."""
    limits = [limits] * len(prompts) if isinstance(limits, int) else list(limits)
    if len(limits) != len(prompts):
        raise UserError(f"max_new_tokens has {len(limits)} numbers for {len(prompts)} prompts")
    sizes = (num_samples, 1 if batch_size is None else batch_size, prefill_chunk)
    if min(*limits, *sizes) < 1:
        raise UserError("max-new-tokens, sizes and numbers of samples should be at least 1")
    if positions not in POSITIONS:
        raise UserError(f"positions should be {' or '.join(POSITIONS)}, not {positions!r}")
    if cache is not None:
        if len(prompts) * num_samples != 1:
            raise UserError("a cache is gone on with by one prompt and one sample")
        layer = cache.layers[0]
        notes = {"scored": layer.scored, "lag": layer.lag, "window": layer.window}
        if (notes, layer.compact) != (policy.notes(), positions == "compact"):
            raise UserError("the cache was made for another policy or other positions")
    return limits
