"""Lethe inside transformers: a model that you load there, and `generate` as you know it.

    python examples/with_transformers.py [MODEL]

MODEL is a folder or a hub's id; by default the small reasoner of this package. It wants
`pip install -e '.[transformers]'`.
"""

import random
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from lethe_mini import Lethe, reasoner
from lethe_mini.integrations.transformers import pruned
from lethe_mini.reasoner.problems import problem

name = sys.argv[1] if len(sys.argv) > 1 else Path(reasoner.__file__).parent
tokenizer = PreTrainedTokenizerFast.from_pretrained(name)
model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)

prompt = problem("walk", random.Random(0), 40).prompt
inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
cache = pruned(model, Lethe(budget=256))
tokens = model.generate(**inputs, past_key_values=cache, max_new_tokens=1000, do_sample=False)
print(tokenizer.decode(tokens[0]))
print(cache.report())
