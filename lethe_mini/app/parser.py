"""The command line's options, and what they describe: a policy, prompts.

The options of the policies, their defaults and their help are read from the dataclasses, those of a
policy of the user's own too (`--policy path/to/mine.py:Mine`).
"""

import argparse
from dataclasses import Field, fields
from pathlib import Path

from ..errors import UserError
from ..generation.requests import POSITIONS
from ..generation.sampling import Sampling
from ..options import Budget, check_budget, show_budget
from ..parallel import MODES
from ..policies import POLICIES, find_policy
from ..policy import Policy
from .prompts import Prompt, read_prompts, refuse

MAX_NEW_TOKENS = 512
PROMPT = "Explain, step by step, why the sky is blue and sunsets are red."
SHORT = {"lethe": "the algorithm of the paper", "lethe-plus": "Lethe with our additions"}
DEFAULT = "(default: %(default)s)"


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message.replace('argument --budget: --', '--')} (see --help)")


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, Policy]:
    """The options, and the policy that they describe. Raises UserError for what makes no sense."""
    first = Parser(add_help=False)  # the policy comes first: it may bring options of its own
    _add_policy(first)
    kind = _kind(first.parse_known_args(argv)[0])
    args = build_parser(kind).parse_args(argv)
    return args, build_policy(kind, args)


def build_parser(own: type[Policy] | None = None) -> argparse.ArgumentParser:
    """own: a policy whose options are known beside those of the registry."""
    parser = Parser(
        description="Write text with a Llama, Mistral or Qwen model while a policy, such as Lethe "
        "(arXiv 2511.06029), prunes its KV cache."
    )
    _add_model(parser.add_argument_group("model and prompts"))
    _add_sampling(parser.add_argument_group("writing"))
    _add_files(parser.add_argument_group("files and reports"))
    group = parser.add_argument_group("policy", "what stays in the cache")
    _add_policy(group)
    taken = {action.dest for action in parser._actions}
    for name, (spec, owners, words) in _policy_options(own).items():
        if name in taken:
            raise UserError(f"the policy's option {name} is one of the command's own; rename it")
        _add_option(group, spec, owners, ", ".join(words))
    return parser


def _add_model(group) -> None:
    add = group.add_argument
    add("--model", help="a folder, a hub id, reasoner or demo (default: reasoner, which solves a "
        "puzzle made from the seed; with a prompt, demo)")  # fmt: skip
    add("--revision", help="branch, tag or commit of a hub id")
    add("--prompt", action="append", help="a prompt; several are one batch")
    add("--prompt-file", type=Path, help="one prompt a line; .jsonl: objects with prompt or "
        "messages, id, ...; -: standard input")  # fmt: skip
    add("--skip-invalid", action="store_true", help="leave out prompts that cannot be run, and say "
        "why")  # fmt: skip
    add("--interactive", action="store_true", help="a chat that keeps its cache; /exit ends it")
    add("--raw", action="store_true", help="no chat template: continue the text as it stands")
    add("--system", help="a system message before the prompt")
    add("--template", metavar="NAME", help="which of the model's chat templates (default: the one "
        "called default)")  # fmt: skip
    add("--think", action=argparse.BooleanOptionalAction, help="tell the chat template to let the "
        "model think, or not (default: as the template has it)")  # fmt: skip
    add("--device", default="auto", help=f"auto, cpu, cuda, mps {DEFAULT}")
    add("--dtype", default="auto", help=f"auto, float32, bfloat16, float16 {DEFAULT}")
    add("--compile", action="store_true", help="torch.compile: slower to start, then faster")
    add("--parallel", choices=MODES, help="one model over torchrun's processes, "
        "divided by heads and columns, or by layers")  # fmt: skip
    add("--threads", type=int, help="CPU threads (default: all cores; one for a model as small as "
        "the reasoner)")  # fmt: skip
    add("--positions", default="absolute", choices=POSITIONS, help="compact: turn keys to their "
        f"slots, so that a text can be longer than the model's positions {DEFAULT}")  # fmt: skip
    add("--prefill-chunk", type=int, help="prompt tokens read at once (default: by device)")


def _add_sampling(group) -> None:
    add, default = group.add_argument, Sampling()
    add("--max-new-tokens", type=int, help=f"most tokens to write (default: {MAX_NEW_TOKENS}; for "
        "the reasoner's own puzzle, what its solution takes)")  # fmt: skip
    add("--ignore-eos", action="store_true", help="continue after the token that ends a text")
    own = "default: the model's own, else"
    add("--temperature", type=float, help=f"0 is greedy ({own} greedy)")
    add("--top-p", type=float, help="sample from the best tokens that add up to this share "
        f"({own} {default.top_p})")  # fmt: skip
    add("--top-k", type=int, help="sample from so many of the best tokens; 0: all "
        f"({own} {default.top_k})")  # fmt: skip
    add("--seed", type=int, default=default.seed, help=f"seed of the draws {DEFAULT}")
    add("--num-samples", type=int, default=1, help=f"texts per prompt {DEFAULT}")
    add("--batch-size", type=int, help="sequences at once (default: all)")


def _add_files(group) -> None:
    add = group.add_argument
    add("--output", type=Path, help="write results to this JSON Lines file; if it is there, add "
        "what it lacks")  # fmt: skip
    add("--ray", metavar="local|auto|ADDRESS", help="run a prompt file on the workers of a Ray "
        "cluster, and write parts into the folder --output (extra cluster)")  # fmt: skip
    add("--stats", type=Path, help="write statistics and sequences to this JSON file")
    add("--trace", type=Path, help="write what every round kept and dropped to this JSON file")
    add("--lens", type=Path, help="write a page that shows the rounds to this HTML file")
    add("--quiet", action="store_true", help="only the text, no report")


def _add_policy(group) -> None:
    for name, words in SHORT.items():
        group.add_argument(f"--{name}", action="store_true", help=f"--policy {name}: {words}")
    group.add_argument("--policy", help=f"{', '.join(POLICIES)}, or path/to/file.py:Class "
        "(default: full)")  # fmt: skip


def _policy_options(own: type[Policy] | None) -> dict[str, tuple[Field, dict, dict]]:
    """name -> (field, {its default: policies}, its words); --seed is everybody's already."""
    options: dict = {}
    foreign = [own] if own not in (None, *POLICIES.values()) else []
    for policy in (*foreign, *POLICIES.values()):
        for spec in fields(policy):
            if spec.name == "seed" or type(spec.default) not in (bool, int, float, str):
                continue
            _, owners, words = options.setdefault(spec.name, (spec, {}, {}))
            words |= spec.metadata.get("choices") or {}
            owners.setdefault(spec.default, []).append(policy.name or policy.__name__)
    return options


def _add_option(group, spec: Field, owners: dict, words: str) -> None:
    """One option of a policy. It is absent from the parsed options where it is not given."""
    default = _defaults(owners, show_budget if spec.name == "budget" else str)
    text = f"{spec.metadata.get('help', '')}{': ' + words if words else ''} ({default})"
    text = text.strip().replace("%", "%%")
    flag, kind = "--" + spec.name.replace("_", "-"), {"type": type(spec.default)}
    if kind["type"] is bool:
        kind = {"action": argparse.BooleanOptionalAction}
    if spec.name == "budget":
        kind = {"type": parse_budget, "metavar": "N|P%|none"}
    group.add_argument(flag, default=argparse.SUPPRESS, help=text, **kind)


def _defaults(owners: dict, show) -> str:
    everybody = sum(len(names) for names in owners.values()) >= len(POLICIES) - 1  # all but full
    if everybody and len(owners) == 1:
        return f"default: {show(next(iter(owners)))}"
    each = [f"{show(value)} for {'/'.join(names)}" for value, names in owners.items()]
    return f"default: {', '.join(each)}"


def parse_budget(word: str) -> Budget:
    """25% is a share, 512 a number of tokens, none is Algorithm 1 alone."""
    if word == "none":
        return None
    try:
        budget = float(word[:-1]) / 100 if word.endswith("%") else int(word)
        check_budget(budget)
    except ValueError:  # a UserError is one, too
        raise argparse.ArgumentTypeError(
            "--budget should be a number of tokens such as 512, a share of the text such as 25%, "
            f"up to 100%, or none, not {word!r}"
        ) from None
    return budget


def _kind(args: argparse.Namespace) -> type[Policy]:
    """The class of the policy that is asked for. Raises UserError for two at once."""
    short = [name for name in SHORT if getattr(args, name.replace("-", "_"))]
    asked = [f"--{name}" for name in short]
    if args.policy is not None and short != [args.policy]:
        asked.append(f"--policy {args.policy}")
    if len(asked) > 1:
        raise UserError(f"{' and '.join(asked)} name two policies; give one")
    return find_policy(args.policy or (short[0] if short else "full"))


def build_policy(kind: type[Policy], args: argparse.Namespace) -> Policy:
    """The policy that the options describe. Raises UserError for one that it does not have."""
    name, known = kind.name or kind.__name__, {spec.name for spec in fields(kind)}
    options = _policy_options(kind)
    given = {key: value for key, value in vars(args).items() if key in options}
    for key in given:
        if key not in known:
            owners = [policy for names in options[key][1].values() for policy in names]
            flag = "--" + key.replace("_", "-")
            raise UserError(f"policy {name} has no {flag}; it is an option of {', '.join(owners)}")
    if "seed" in known:
        given["seed"] = args.seed
    return kind(**given)


def gather_prompts(args: argparse.Namespace) -> list[Prompt]:
    """Those of --prompt or of --prompt-file; none where the command is to choose one. Raises
    UserError for those that cannot be run whatever the model is, unless they are left out."""
    if args.prompt and args.prompt_file is not None:
        raise UserError("give --prompt or --prompt-file, not both")
    if args.prompt_file is not None:
        prompts = read_prompts(args.prompt_file, args.raw, args.system)
        refuse([prompt for prompt in prompts if prompt.error], len(prompts), args.skip_invalid)
        return prompts
    texts = args.prompt or []
    several = len(texts) > 1
    return [
        Prompt(number, text, None, number, f"prompt {number}" if several else "")
        for number, text in enumerate(texts, 1)
    ]
