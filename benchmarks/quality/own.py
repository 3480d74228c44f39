"""A model's own chains: what it writes with the full cache, to be read again under a policy.

Problems come from the accuracy benchmark's sources. The model solves each by itself, greedily, in
batches. A text is several problems and their chains behind one another, or one long chain alone.
Its prompt is that of its first problem. Only what the model wrote is counted, its end included.
"""

from dataclasses import dataclass

from tqdm import tqdm

from benchmarks.accuracy import problems as source
from benchmarks.common.results import Lines
from lethe_mini import Engine, Sampling, UserError
from lethe_mini.jsonlines import digest

GYM_SEEDS = {"choose": 1000, "report": 0}  # added to the seed


@dataclass
class Chain:
    """A problem as the model reads it, and what it wrote."""

    prompt: list[int]
    written: list[int]


@dataclass
class Text:
    """ids: the last one is predicted, not read. own: which of them the model wrote."""

    ids: list[int]
    own: list[bool]
    prompt: int


def load(task: str, split: str, seed: int, count: int) -> list[str]:
    """`count` prompts of a split. Of a file its odd lines are for choosing and its even ones for
    reporting. Raises UserError."""
    if task.startswith("gym:"):
        found = source.load(task, count, (), GYM_SEEDS[split] + seed)
    else:
        found = source.load(task, None, (), 0)[0 if split == "choose" else 1 :: 2]
    return [problem.prompt for problem in found][:count]


def write(
    engine: Engine, prompts: list[str], lines: Lines, most: int, batch: int, weights: str
) -> list[Chain]:
    """The model's chains, of at most so many tokens, in the order of the prompts; greedy. weights:
    their short name, by which chains in `lines` are found again."""
    run = {"task": "chain", "weights": weights, "dtype": str(engine.dtype), "most": most}
    run["device"] = engine.device.type
    asked = {text: engine.text.encode_prompt(text) for text in prompts}
    keys = {text: {**run, "prompt": digest(ids)} for text, ids in asked.items()}
    left = [text for text, key in keys.items() if lines.get(key) is None]
    with tqdm(total=len(left), unit="chain", disable=None) as bar:

        def on_finish(index: int, one) -> None:
            if one.finish_reason != "interrupted":
                facts = {"ids": one.token_ids, "finish_reason": one.finish_reason}
                lines.put(keys[left[index]], facts)
                bar.update()

        if left:
            engine.generate(
                [asked[text] for text in left],
                max_new_tokens=most,
                sampling=Sampling(),
                batch_size=batch,
                on_finish=on_finish,
            )
    found = {text: lines.get(key) for text, key in keys.items()}
    if None in found.values():
        raise KeyboardInterrupt
    return [Chain(asked[text], found[text]["ids"]) for text in prompts]


def joined(chains: list[Chain], tokens: int) -> list[Text]:
    """Texts of at least `tokens` tokens, each of as many whole problems as that takes."""
    texts, ids, own, prompt = [], [], [], 0
    for chain in chains:
        prompt = prompt or len(chain.prompt)
        ids = ids + chain.prompt + chain.written
        own = own + [False] * len(chain.prompt) + [True] * len(chain.written)
        if len(ids) > tokens:
            texts.append(Text(ids, own, prompt))
            ids, own, prompt = [], [], 0
    return texts


def alone(chains: list[Chain], tokens: int) -> list[Text]:
    """One problem each, of at least `tokens` tokens."""
    return [text for chain in chains for text in joined([chain], tokens)]


def texts(engine: Engine, args, lines: Lines, weights: str) -> list[Text]:
    """What `run.py own` reads. Raises UserError where there is too little."""
    prompts = load(args.problems, args.split, args.seed, args.count)
    chains = write(engine, prompts, lines, args.max_new_tokens, args.batch_size, weights)
    found = (alone if args.alone else joined)(chains, args.tokens)
    if not found:
        raise UserError(f"no text has {args.tokens:,} tokens; ask for fewer, or for more problems")
    return found[: args.texts]


def mean_length(texts: list[Text]) -> int:
    """Tokens, of which a budget in percent is a share."""
    return round(sum(len(text.ids) for text in texts) / len(texts))
