"""What a turn reads: all that the chat template writes for the whole conversation and that was not
read before. Templates, replies and the ways they end are drawn; the oracle writes texts by hand.
"""

from dataclasses import dataclass

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_chat import Reading
from tokenizers import Tokenizer, models, normalizers

import lethe_mini.engine
from lethe_mini.app.chat import REWRITES, Conversation
from lethe_mini.checkpoint.template import ChatTemplate
from lethe_mini.checkpoint.text import Text
from lethe_mini.engine import Engine
from lethe_mini.errors import UserError
from lethe_mini.policy import FullKV, Lethe

START, END, END_ID = tiny.START, tiny.END, 257


@dataclass(frozen=True)
class Style:
    """A template: how it writes a question and a reply, and what it wants."""

    lead: str  # before a reply's text, but not where the model begins one
    gap: str  # after it
    close: str  # what ends it
    trims: bool
    numbers: bool
    system: str  # what it does with a system message: "takes", "wants" or "refuses"

    @property
    def source(self) -> str:
        error = {
            "takes": "false",
            "wants": "messages[0].role != 'system'",
            "refuses": "messages[0].role == 'system'",
        }[self.system]
        number = "{{ loop.index }}: " if self.numbers else ""
        text = "m.content | trim" if self.trims else "m.content"
        return (
            "{% if " + error + " %}{{ raise_exception('not like this') }}{% endif %}"
            "{% for m in messages %}{% if m.role == 'assistant' %}"
            + f"{START}assistant\n{self.lead}{{{{ {text} }}}}"
            + "{{ " + repr(self.gap + self.close) + " }}"
            + "{% else %}" + f"{START}{{{{ m.role }}}}\n{number}{{{{ m.content }}}}{END}\n"
            + "{% endif %}{% endfor %}"
            + "{% if add_generation_prompt %}" + f"{START}{{{{ 'assistant\\n' }}}}"
            + "{% endif %}"
        )  # fmt: skip

    def question(self, number: int, text: str, role: str = "user") -> str:
        mark = f"{number}: " if self.numbers else ""
        return f"{START}{role}\n{mark}{text}{END}\n"


styles = st.builds(
    Style,
    lead=st.sampled_from(["", " ", "\n"]),
    gap=st.sampled_from(["", " ", "\n", " \n"]),
    close=st.sampled_from([END, END + "\n", "~~", END + END]),
    trims=st.booleans(),
    numbers=st.booleans(),
    system=st.sampled_from(["takes", "wants", "refuses"]),
)
words = st.text(st.sampled_from("ab \n~"), max_size=5)
replies = st.tuples(words, st.sampled_from(["itself", "length", "Ctrl-C"]))
turns = st.lists(st.tuples(words.map(lambda text: text + "?"), replies), min_size=1, max_size=4)


class Talker:
    """An engine whose model notes what it reads and says what it is told to."""

    def __init__(self, engine: Engine):
        self.engine, self.script = engine, []
        engine.model = self.model = Reading(engine.model)

    def begin(self, source, system=None, policy=None, specials=None, **options) -> Conversation:
        self.engine.text.template = ChatTemplate({"default": source}, specials or {})
        self.model.tokens = []
        return Conversation(self.engine, policy or FullKV(), system, **options)

    def say(self, chat, text, reply, how="itself"):
        """One turn, whose reply is this text, which ends as `how` says. -> its tokens"""
        ids = self.engine.text.encode(reply, add_special_tokens=False)
        self.script = ids + [END_ID] * (how == "itself")
        chat.options["max_new_tokens"] = len(self.script) + (how == "Ctrl-C")

        def on_token(*_):
            if how == "Ctrl-C" and not self.script:
                raise KeyboardInterrupt

        one = chat.say(text, on_token).sequences[0]
        assert one.finish_reason == {"itself": "stop", "length": "length"}.get(how, "interrupted")
        return one.token_ids

    def tokens(self, chat) -> list[int]:
        """All that was read, and what waits for the next turn."""
        assert chat.cache.seen == [len(self.model.tokens)]
        return self.model.tokens + chat.unread

    def text(self, chat) -> str:
        return "".join(self.engine.text.pieces(self.tokens(chat)))


@pytest.fixture(scope="module")
def talker(tmp_path_factory):
    folder = tiny.folder(tmp_path_factory.mktemp("talk") / "m", eos=(END_ID,))
    made = Talker(Engine.from_pretrained(str(folder), device="cpu", dtype="float32"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lethe_mini.engine, "sample", lambda *_: torch.tensor([made.script.pop(0)]))
        yield made


@settings(max_examples=150)
@given(style=styles, turns=turns, system=st.none() | st.just("Be kind."))
def test_a_turn_reads_what_the_template_writes_after_the_last_reply(talker, style, turns, system):
    """By hand: every question as it is written, then the reply as it came, then what closes it, but
    for an end that the reply has already, with the white space before it. Where replies come as the
    template writes them, that is the whole conversation."""
    chat = talker.begin(style.source, system)
    if system is None if style.system == "wants" else system and style.system == "refuses":
        with pytest.raises(UserError, match="not like this"):
            talker.say(chat, turns[0][0], "a")
        assert (chat.turns, chat.messages[1:], chat.unread) == (0, [], [])
        return
    expected, faithful, number = "", not style.lead, 1
    if system is not None:
        expected, number = style.question(1, system, "system"), 2
    for text, (reply, how) in turns:
        reply = reply or "a" * (how != "itself")
        talker.say(chat, text, reply, how)
        expected += style.question(number, text) + f"{START}assistant\n" + reply
        read = expected + END * (how == "itself")
        assert talker.text(chat) == read
        ended = how == "itself" and style.close.startswith(END)
        expected += style.close if ended else END * (how == "itself") + style.gap + style.close
        faithful &= not style.trims or reply == reply.strip()
        faithful &= how != "itself" or (ended and not style.gap)
        number += 2
    whole = talker.engine.text.chat([*chat.messages, {"role": "user", "content": "x"}])
    last = style.question(number, "x") + f"{START}assistant\n"
    if faithful:
        assert expected + last == whole
    assert not chat.rewrites
    assert REWRITES not in chat.stats()


def test_a_conversation_may_be_as_long_as_one_likes_under_a_policy(talker):
    """What a policy drops is dropped; what is read stays what the template writes."""
    style = Style("", "", END + "\n", False, True, "takes")
    policy = Lethe(budget=47, interval=5, protect_prompt=False)
    chat, expected = talker.begin(style.source, None, policy), ""
    for turn in range(6):
        how = ("itself", "length", "Ctrl-C")[turn % 3]
        talker.say(chat, "and then?", "so it is.", how)
        expected += style.question(2 * turn + 1, "and then?") + f"{START}assistant\nso it is."
        assert talker.text(chat) == expected + END * (how == "itself")
        expected += END + "\n"
    assert chat.cache.held < 6 * len(talker.model.tokens) / 2


# -- templates that write earlier turns otherwise


def test_a_template_that_drops_thoughts_is_said_to(talker):
    """The cache keeps the thought that it read, and /stats says so from the turn on that finds it;
    /reset begins anew."""
    chat = talker.begin(tiny.THINKING, "Be kind.")
    talker.say(chat, "Why?", "<think>\nhm\n</think>\n\nSo.")
    assert REWRITES not in chat.stats()
    talker.say(chat, "And?", "Yes.")
    assert chat.stats().endswith(REWRITES)
    head = f"{START}assistant\n"
    assert talker.text(chat) == (
        f"{START}system\nBe kind.{END}\n{START}user\nWhy?{END}\n{head}"
        f"<think>\nhm\n</think>\n\nSo.{END}\n{START}user\nAnd?{END}\n{head}Yes.{END}"
    )
    assert "hm" not in talker.engine.text.chat(chat.messages)
    chat.reset()
    assert REWRITES not in chat.stats()
    assert chat.messages == [{"role": "system", "content": "Be kind."}]


@pytest.mark.parametrize("think", [True, False, None])
def test_thinking_holds_for_every_turn(talker, think):
    chat = talker.begin(tiny.THINKING, "Be kind.", think=think)
    empty = "<think>\n\n</think>\n\n" if think is False else ""
    for text in ("a", "b"):
        talker.say(chat, text, "So.")
    assert talker.text(chat).count(f"{START}assistant\n{empty}So.{END}") == 2
    assert chat.rewrites is (think is False)  # the empty thought of the first turn


def test_a_text_like_the_mark_is_no_mark(talker):
    """The place where a reply ends is found whatever is said."""
    mark = "(the text goes on here)"
    chat = talker.begin(Style(" ", "", END, True, False, "takes").source)
    talker.say(chat, mark, mark + " ")
    talker.say(chat, mark + ".", "So", "length")
    question = f"{START}user\n{mark}%s{END}\n{START}assistant\n"
    assert talker.text(chat) == question % "" + mark + " " + END + question % "." + "So"


def test_an_empty_reply_is_closed_where_the_template_would_leave_it_out(talker):
    """It was begun, so the cache holds its head."""
    source = tiny.TEMPLATE.replace("{{ m.content }}", "{{ m.content | trim }}")
    source = source.replace("messages %}", "messages if m.content %}")
    chat = talker.begin(source)
    talker.say(chat, "a", "")
    talker.say(chat, "b", "c")
    head = f"{START}assistant\n"
    asked = [f"{START}user\n{text}{END}\n{head}" for text in "ab"]
    assert talker.text(chat) == asked[0] + f"{END}\n" + asked[1] + "c" + END


def test_a_template_without_replies_takes_one_turn(talker):
    """One line of error; the conversation stays as it was."""
    chat = talker.begin("{{ messages[0].content }}")
    talker.say(chat, "a", "b")
    with pytest.raises(UserError, match="leaves out replies"):
        talker.say(chat, "c", "d")
    assert (chat.turns, talker.text(chat)) == (1, "ab" + END)


def test_special_tokens_in_a_reply_stay_what_they_are(talker):
    """The template gets them by name, in a reply that another end of text ended, too."""
    chat = talker.begin(tiny.TEMPLATE)
    talker.say(chat, "a", f"b{START}c")
    assert chat.messages[-1] == {"role": "assistant", "content": f"b{START}c"}
    talker.say(chat, "d", "e")
    assert not chat.rewrites
    head = f"{START}assistant\n"
    said = f"{START}user\na{END}\n{head}b{START}c{END}\n{START}user\nd{END}\n{head}e{END}"
    assert talker.text(chat) == said


def test_the_end_of_a_text_has_the_tokens_that_it_has_in_the_whole(tmp_path):
    """Where a tokenizer begins each text with a space, and where a token lies over the border."""
    vocab = {token: id for id, token in enumerate(["▁", "a", "b", "c", "bc", "▁a", "<s>"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[("b", "c"), ("▁", "a")]))
    tokenizer.normalizer = normalizers.Prepend("▁")
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    text = Text(tmp_path)

    def pieces(whole, end):
        return [tokenizer.id_to_token(id) for id in text.encode_end(whole, end)]

    assert pieces("abac", "ac") == ["a", "c"]
    assert pieces("abac", "abac") == ["▁a", "b", "a", "c"]
    assert pieces("ab<s>a", "<s>a") == ["<s>", "▁a"]
    assert pieces("abc", "c") == ["▁", "c"]  # bc is one token in the whole
    assert pieces("abc", "") == []
