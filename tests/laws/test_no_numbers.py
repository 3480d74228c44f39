"""Laws of logits that are not numbers: under any policy the run ends in one line that says so.

One infinite weight makes them NaN. In the embedding of a token, it does so for that sequence alone.
"""

import copy
import dataclasses
import math

import pytest
import tape
from texts import generate, new_model, some_tokens

from lethe_mini import experts
from lethe_mini.errors import PromptError
from lethe_mini.generation import capture
from lethe_mini.policy import Pruner

PROMPTS = [[token % 17 for token in some_tokens(n, seed=n)] for n in (3, 11, 5)]
SAMPLED = {"temperature": 0.8, "top_k": 11, "top_p": 0.9, "seed": 3}


def spoiled(token=None):
    """A model with one infinite weight, in the embedding of a token, or of every token."""
    model = copy.deepcopy(new_model()).requires_grad_(False)
    if token is None:
        model.layers[0].mlp.down_proj.weight[0, 0] = math.inf
    else:
        model.embed_tokens.weight[token, 0] = math.inf
    return model


def fails(model, prompts, policy, **options):
    """-> the number of the prompt that is named, and the tokens that were told before."""
    told = []
    options["on_token"] = lambda index, token: told.append((index, token))
    with pytest.raises(PromptError, match=r"logits are not numbers .*--dtype float32") as caught:
        generate(model, prompts, policy, **options)
    assert len(caught.value.lines()) == 1
    return caught.value.number, told


def test_a_prompt_whose_logits_are_not_numbers_gives_no_token(policy):
    """Also where a round comes before the first token."""
    if isinstance(policy, Pruner):
        policy = dataclasses.replace(policy, protect_prompt=False)
    for draws in ({}, SAMPLED):
        assert fails(spoiled(), [some_tokens(60, seed=1), *PROMPTS], policy, **draws) == (0, [])


def test_a_sequence_that_goes_bad_is_named(monkeypatch, policy):
    """In the middle of a batch, at the step after the token that spoils it; up to there all is as
    in a good model. A step that is replayed tells it as well, and no step reads what is no token.
    """
    monkeypatch.setitem(experts.SORTED, "cpu", experts.SORTED["other"])
    for draws in ({}, SAMPLED):
        told = []
        note = {"on_token": lambda index, token, told=told: told.append((index, token))}
        generate(new_model(), PROMPTS, policy, **draws, **note)
        tokens = [token for _, token in told]
        at = max(tokens.index(token) for token in set(tokens) if token >= 17)  # the last new one
        assert at > 5 * 3
        options = {**draws, "max_new_tokens": 40}  # so that even the last one is read
        named, before = fails(spoiled(tokens[at]), PROMPTS, policy, **options)
        assert (named, before) == (told[at][0], told[: at - at % 3 + 3])
        monkeypatch.setitem(capture.CAPTURE, "cpu", lambda step, before: tape.capture(step))
