"""A conversation in the terminal that keeps its pruned cache from turn to turn.

What was read or written is never read again: each turn only adds the new tokens to the cache. What
the cache has forgotten it has forgotten; `/stats` shows how much that is.
"""

import sys

from ..cache import KVCache
from ..engine import Engine
from ..errors import UserError
from ..generation.stats import Result, kv_bytes
from ..policy import Policy

HELP = "/reset forgets everything, /stats shows the cache, /exit ends; Ctrl-C stops a reply"
MARK = "\u241freply\u241f"  # stands for the last reply where the template is asked what follows it


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

    def say(self, text: str, on_token=None) -> Result:
        """One turn: reads what is new, returns the reply. Raises UserError."""
        ids, before = self._next_ids(text), self.cache.seen[0]
        result = self.engine.generate(
            [ids], self.policy, cache=self.cache, on_token=on_token, **self.options
        )
        self.unread = (ids + result.sequences[0].token_ids)[self.cache.seen[0] - before :]
        self.turns += 1
        return result

    def _next_ids(self, text: str) -> list[int]:
        """The tokens between what the cache has seen and the reply to `text`."""
        tokenizer = self.engine.text
        if not text.strip():
            raise UserError("say something, or /exit")
        if not self.turns:
            return tokenizer.encode_prompt(text, self.system, think=self.think)
        if not tokenizer.has_template:
            return self.unread + tokenizer.encode(text, add_special_tokens=False)
        # Only what the template writes after a reply is new: the end of that, and this turn.
        messages = [{"role": "user", "content": "-"}, {"role": "assistant", "content": MARK}]
        rendered = tokenizer.chat([*messages, {"role": "user", "content": text}], self.think)
        after = rendered.rpartition(MARK)[2]
        ids = tokenizer.encode(after, add_special_tokens=False)
        # A reply that ended by itself ends in the token that the template writes first.
        return self.unread[:-1] + ids if self.unread[-1:] == ids[:1] else self.unread + ids

    def stats(self) -> str:
        """What the cache holds of what it has seen, in one line."""
        cache, layers = self.cache, len(self.cache.layers)
        seen, held = cache.seen[0], cache.held / layers
        forgotten, size = 1 - held / max(1, seen), kv_bytes(cache) / 1e6
        return (
            f"{self.turns} turns, {seen} tokens seen, {held:.0f} held per layer on average "
            f"({forgotten:.0%} forgotten), {size:.2f} MB of keys and values"
        )


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
