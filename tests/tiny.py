"""Small things that several tests share: a random model of odd sizes, a checkpoint folder of it.

Weights are scaled so that attention has preferences: under uniform attention no policy could go
wrong. The folder's tokenizer has a token per byte and the two marks of a chat.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from lethe_mini.attention import causal_mask
from lethe_mini.checkpoint.config import parse_config
from lethe_mini.checkpoint.load import named_weights
from lethe_mini.engine import Engine
from lethe_mini.kernels import write
from lethe_mini.model import Transformer
from lethe_mini.policies.lethe_plus import LethePlus, keys_before_rope, repeats

START, END = "<|start|>", "<|end|>"
TEMPLATE = (
    "{% for m in messages %}" + START + "{{ m.role }}\n{{ m.content }}" + END + "\n{% endfor %}"
    "{% if add_generation_prompt %}" + START + "assistant\n{% endif %}"
)
# As Qwen3's does, this template writes a thought into the last reply, even an empty one, leaves out
# those before the last question, and lets `enable_thinking` put an empty thought at the end.
REPLY = r"""
        {%- set thought = '' %}
        {%- if message.reasoning_content is string %}
            {%- set thought = message.reasoning_content %}
        {%- elif '</think>' in said %}
            {%- set thought = said.split('</think>')[0].rstrip('\n').split('<think>')[-1] %}
            {%- set said = said.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {{- '<|start|>assistant\n' }}
        {%- if loop.index0 > seen.question and (loop.last or thought) %}
            {{- '<think>\n' + thought.strip('\n') + '\n</think>\n\n' + said.lstrip('\n') }}
        {%- else %}
            {{- said }}
        {%- endif %}
        {{- '<|end|>\n' }}
"""
HEAD_OF_REPLY = r"""
{%- if add_generation_prompt %}
    {{- '<|start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}
{%- endif %}"""
THINKING = (
    r"""
{%- if not messages %}
    {{- raise_exception('there should be a message') }}
{%- endif %}
{%- if messages[0].role != 'system' %}
    {{- '<|start|>system\nIt is the year ' + strftime_now('%Y') + '.<|end|>\n' }}
{%- endif %}
{%- if tools %}
    {{- tools | tojson }}
{%- endif %}
{%- set seen = namespace(question=-1) %}
{%- for message in messages[::-1] %}
    {%- set index = messages | length - 1 - loop.index0 %}
    {%- set asks = message.role == 'user' and not message.content.startswith('<tool>') %}
    {%- if asks and seen.question == -1 %}
        {%- set seen.question = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {%- set said = message.content %}"""
    + REPLY
    + r"""
    {%- elif message.role in ('system', 'user') %}
        {{- '<|start|>' + message.role + '\n' + message.content + '<|end|>\n' }}
    {%- else %}
        {{- raise_exception('no role is called ' + message.role | tojson) }}
    {%- endif %}
{%- endfor %}"""
    + HEAD_OF_REPLY
)
SIZES = {
    "architectures": ["Qwen2ForCausalLM"],
    "vocab_size": 258,
    "hidden_size": 24,
    "intermediate_size": 29,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "max_position_embeddings": 4093,
}


def model(spread=2.0, **changes):
    """A random transformer, float32, whose weights have this spread; `changes` are keys of
    config.json."""
    torch.manual_seed(0)
    made = Transformer(parse_config({**SIZES, **changes})).eval().requires_grad_(False)
    for parameter in made.parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=spread / parameter.shape[-1] ** 0.5)
        else:
            parameter.uniform_(0.5, 1.5)
    made.init_rope("cpu")
    return made


def engine(**changes):
    """An engine without text: its prompts are token ids."""
    return Engine(model(**changes))


def byte_tokenizer():
    """Token i is byte i, in the order of the byte-level alphabet; 256 and 257 are START and END."""
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    vocab = {char: index for index, char in enumerate(sorted(level.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = level, decoders.ByteLevel()
    tokenizer.add_special_tokens([START, END])
    return tokenizer


def folder(path, eos=(257,), template=TEMPLATE, **changes):
    """A checkpoint in `path`: config, weights, tokenizer, chat template (or None). Returns it."""
    path.mkdir(exist_ok=True)
    config = {**SIZES, **changes, "eos_token_id": list(eos)}
    (path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    weights = named_weights(model(**changes))
    named = {k if k.startswith("lm_head") else f"model.{k}": v for k, v in weights.items()}
    save_file(named, path / "model.safetensors")
    byte_tokenizer().save(str(path / "tokenizer.json"))
    settings = {} if template is None else {"chat_template": template}
    (path / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return path


MAIN = "import sys; from lethe_mini.app.cli import main; sys.exit(main())"


def command(*argv, **options):
    """The command line in a process of its own, on one thread; options are those of Popen."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    argv = [sys.executable, "-c", MAIN, *map(str, argv)]
    return subprocess.Popen(argv, env=env, **options)


def put(cache, tokens):
    """Stores T tokens in every layer of a KVCache as the model does: tokens, a layer's (k, v) each,
    (B, H_kv, T, D). -> the mask of their queries in every layer."""
    T, masks = tokens[0][0].shape[2], []
    cache.reserve(T)
    positions = cache.next[:, None] + torch.arange(T)
    for layer, (k, v) in zip(cache.layers, tokens, strict=True):
        store, slots = layer.place(T)
        write(store, slots, k, v, positions)
        masks.append(causal_mask(slots, store["keys"].shape[2]))
    cache.next.add_(T)
    cache.count(T)
    return masks


def mask_of(kept):
    """What `LayerCache.evict` takes: kept, [i][head] the slots of a sequence -> bool (R, H_kv, S)
    and how many they are."""
    slots = 1 + max((max(head, default=0) for heads in kept for head in heads), default=0)
    mask = [[[slot in set(head) for slot in range(slots)] for head in heads] for heads in kept]
    return torch.tensor(mask).bool(), [len(heads[0]) for heads in kept]


def observe(layer, q=None, mass=None):
    """What the model leaves in a LayerCache after a step: mass (B, H_kv, S), q (B, H, T, D)."""
    if mass is not None:
        layer.scores.add_(mass)
    if q is not None:
        layer.remember(q)


def distinct(policy, layer, row, room, recent):
    """Which tokens no newer one repeats, [head][slot], and how many of them are to stay."""
    if not isinstance(policy, LethePlus):
        return None, 0
    mean = policy.limit(0, layer.seen.counts[row])  # of layers, what one may keep without a prompt
    near = min(recent, max(policy.min_recent, 2 * int(policy.recent_ratio * mean)))
    near, rows = torch.tensor([near + policy.interval]), torch.tensor([row])
    cosine = repeats(keys_before_rope(layer, rows), layer.filled[rows], near, 0)[0]
    cosine = cosine if policy.per_head else cosine.mean(0).expand_as(cosine)
    return (cosine <= policy.alike).tolist(), int(policy.distinct_ratio * (room - recent))
