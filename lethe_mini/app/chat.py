"""A conversation in the terminal that keeps its pruned cache from turn to turn.

What was read or written is never read again: each turn only adds the new tokens to the cache. They
are what the chat template writes for the whole conversation after its last reply. What the cache
has forgotten it has forgotten; `/stats` shows how much that is.
"""

import sys

from ..cache import KVCache
from ..engine import Engine
from ..errors import UserError
from ..generation.stats import Result, kv_bytes
from ..policy import Policy

HELP = "/reset forgets everything, /stats shows the cache, /exit ends; Ctrl-C stops a reply"
REWRITES = "; the chat template now writes earlier turns otherwise, the cache keeps what it read"


class Conversation:
    """Turns of one sequence over one cache. Options are those of `Engine.generate`. Raises
    UserError where `think` cannot be told to the chat template."""

    def __init__(
        self,
        engine: Engine,
        policy: Policy,
        system: str | None = None,
        think: bool | None = None,
        **options,
    ):
        engine.text.template.check_think(think)
        self.engine, self.policy, self.system, self.options = engine, policy, system, options
        self.think = think
        self.positions = options.get("positions", "absolute")
        self.reset()

    def reset(self) -> None:
        """Forgets all turns."""
        self.cache: KVCache = self.engine.new_cache(self.policy, self.positions)
        self.unread: list[int] = []  # sampled or said, but not in the cache yet
        self.turns = 0
        # What was said, for the template; a reply as it was written, less the token that ended it.
        self.messages = [] if self.system is None else [{"role": "system", "content": self.system}]
        self.text = ""  # all that was read and written, less the token that ended the last reply
        self.ended: int | None = None  # that token
        self.rewrites = False  # does the template write earlier turns otherwise by now?

    def say(self, text: str, on_token=None) -> Result:
        """One turn: reads what is new, returns the reply. Raises UserError."""
        if not text.strip():
            raise UserError("say something, or /exit")
        said = {"role": "user", "content": text}
        whole, end = self._written(said)
        ids, before = self._next_ids(text, whole, end), self.cache.seen[0]
        result = self.engine.generate(
            [ids], self.policy, cache=self.cache, on_token=on_token, **self.options
        )
        reply = result.sequences[0].token_ids
        self.unread = (ids + reply)[self.cache.seen[0] - before :]
        self.rewrites = not _alike(whole.removesuffix(end), self.text)
        self.ended = reply[-1] if reply and reply[-1] in self.engine.text.eos_ids else None
        reply = reply if self.ended is None else reply[:-1]
        content = self._wording(reply)
        self.messages += [said, {"role": "assistant", "content": content}]
        self.text += end + content
        self.turns += 1
        return result

    def _written(self, said: dict) -> tuple[str, str]:
        """What the template writes for the whole conversation, and the end of it that is new."""
        tokenizer, messages = self.engine.text, [*self.messages, said]
        if not tokenizer.has_template:
            return self.text, ""
        if self.turns:
            return tokenizer.template.follows(messages, self.think, self.text)
        whole = tokenizer.chat(messages, self.think)
        return whole, whole

    def _next_ids(self, text: str, whole: str, end: str) -> list[int]:
        """The tokens between what the cache has seen and the reply to `text`."""
        tokenizer = self.engine.text
        if not tokenizer.has_template:
            if not self.turns:
                return tokenizer.encode_prompt(text, self.system)
            return self.unread + tokenizer.encode(text, add_special_tokens=False)
        ids = tokenizer.encode_end(whole, end)
        # The template ends the last reply, perhaps after white space. A reply that ended by itself
        # ends in the same token.
        if self.ended in ids:
            first = ids.index(self.ended)
            if not self._wording(ids[:first]).strip():
                ids = ids[first + 1 :]
        return self.unread + ids

    def _wording(self, ids: list[int]) -> str:
        """The text of tokens, special ones by name."""
        return "".join(self.engine.text.pieces(ids)) if ids else ""

    def stats(self) -> str:
        """What the cache holds of what it has seen, in one line."""
        cache, layers = self.cache, len(self.cache.layers)
        seen, held = cache.seen[0], cache.held / layers
        forgotten, size = 1 - held / max(1, seen), kv_bytes(cache) / 1e6
        return (
            f"{self.turns} turns, {seen} tokens seen, {held:.0f} held per layer on average "
            f"({forgotten:.0%} forgotten), {size:.2f} MB of keys and values"
            f"{REWRITES if self.rewrites else ''}"
        )


def _alike(one: str, other: str) -> bool:
    """Are the texts the same but for white space?"""
    return "".join(one.split()) == "".join(other.split())


def chat(conversation: Conversation) -> int:
    """Reads lines from standard input until /exit or its end; replies stream to standard output."""
    print(HELP, file=sys.stderr)
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except (EOFError, KeyboardInterrupt):
            print(file=sys.stderr)
            return 0
        if line == "/exit":
            return 0
        if line == "/reset":
            conversation.reset()
        elif line == "/stats":
            print(conversation.stats(), flush=True)
        elif line.startswith("/"):
            print(HELP, file=sys.stderr)
        elif line:
            stream = conversation.engine.text.stream()

            def show(_, token: int, stream=stream) -> None:
                print(stream.push(token), end="", flush=True)

            try:
                conversation.say(line, show)
                print(stream.flush(), flush=True)
            except UserError as error:
                print(f"error: {error}", file=sys.stderr)
