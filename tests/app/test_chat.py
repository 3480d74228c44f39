"""A conversation: many turns over one cache are one long text that is read once.

Nothing is read again, nothing is lost between two turns, and Ctrl-C stops a reply between two
tokens, so that what follows is as if the reply had been that short.
"""

import builtins
import dataclasses
import io
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch

import lethe_mini.engine
from lethe_mini.app.chat import HELP, Conversation
from lethe_mini.app.cli import main
from lethe_mini.cache import LayerCache
from lethe_mini.engine import Engine
from lethe_mini.errors import UserError
from lethe_mini.policies import POLICIES, LethePlus
from lethe_mini.policy import FullKV, Lethe

END_ID, OTHER_END = 257, 70
SAY = ["Hello there, how are you?", "x", "And why is that? " * 4, "é€", "good bye"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.folder(tmp_path_factory.mktemp("chat") / "tiny", eos=(END_ID, OTHER_END))


@pytest.fixture(scope="module")
def engine(folder):
    return Engine.from_pretrained(str(folder), device="cpu", dtype="float32")


@pytest.fixture
def exact_engine(folder):
    """In float64, so that rounding, which differs with the size of a chunk, decides nothing."""
    made = Engine.from_pretrained(str(folder), device="cpu", dtype="float32")
    return Engine(made.model.double(), made.text, made.name)


def make(policy, **changes):
    options = {"budget": 47, "interval": 5, "window": 8, "protect_prompt": False, **changes}
    names = {spec.name for spec in dataclasses.fields(policy)}
    return policy(**{name: value for name, value in options.items() if name in names})


CASES = {name: make(policy) for name, policy in POLICIES.items()}
CASES |= {
    "lethe-alone": make(Lethe, budget=None, evict_threshold=31, tau=5.0),
    "lethe-plus-norm": make(LethePlus, value_norm=True, breakpoint="global", tau=20.0),
}


def held(cache):
    """Positions of every layer and head."""
    return [layer.positions[0].tolist() for layer in cache.layers]


def check_whole(cache):
    """All layers have seen the same tokens, and hold the last."""
    for layer in cache.layers:
        assert (layer.positions[0, :, -1] == cache.seen[0] - 1).all()
        assert layer.lengths == [layer.positions.shape[-1]]
        assert (layer.positions.diff() > 0).all()


class Reading:
    """A model that notes which tokens it reads."""

    def __init__(self, model):
        self.model, self.tokens = model, []

    def __getattr__(self, name):
        return getattr(self.model, name)

    def __call__(self, tokens, *args, **kwargs):
        self.tokens += tokens.flatten().tolist()
        return self.model(tokens, *args, **kwargs)


def reading(engine):
    """The engine, with a model that notes what it reads."""
    noting = Engine(engine.model, engine.text)
    noting.model = Reading(engine.model)
    return noting


def wording(engine, turns, system=None):
    """The tokens of a whole conversation, written out; a turn is what is said and the reply's
    tokens, which the template's end mark follows unless it is their last."""
    tokens, encode = [], lambda text: engine.text.encode(text, add_special_tokens=False)
    if system is not None:
        tokens += encode(f"{tiny.START}system\n{system}{tiny.END}\n")
    for text, reply in turns:
        tokens += encode(f"{tiny.START}user\n{text}{tiny.END}\n{tiny.START}assistant\n") + reply
        tokens += encode("\n" if reply[-1:] == [END_ID] else f"{tiny.END}\n")
    return tokens


# -- one long text ---------------------------------------------------------------------------------


def token_by_token(engine, policy, parts, limits, positions, prompt):
    """The long way round: the model and the policy alone, one token at a time. parts: what is read
    before each reply. -> (replies, held positions after each)"""
    cache = engine.new_cache(policy, positions)
    cache.prompt = prompt
    replies, after = [], []

    def read(token):
        return engine.model(torch.tensor([[token]]), cache=cache)[:, -1]

    def round_if_due(prefilled):
        due = policy.due(cache, prefilled)
        if any(due):
            policy.round(cache, due)

    for part, limit in zip(parts, limits, strict=True):
        reply = []
        policy.decay(cache)  # what is said is one update, as a prompt is
        for token in part:
            logits = read(token)
        round_if_due(prefilled=True)
        while True:
            reply.append(int(logits.argmax()))
            if reply[-1] in engine.text.eos_ids or len(reply) == limit:
                break
            policy.decay(cache)
            logits = read(reply[-1])
            round_if_due(prefilled=False)
        replies.append(reply)
        after.append(held(cache))
    return replies, after


@pytest.mark.parametrize("positions", ["absolute", "compact"])
@pytest.mark.parametrize("policy", CASES.values(), ids=CASES)
def test_turns_are_one_long_run_fed_token_by_token(monkeypatch, exact_engine, policy, positions):
    """Five turns: the same replies and the same positions kept in every layer and head after each
    of them as where model and policy are driven by hand, a token at a time, over one cache."""
    engine, noting, parts = exact_engine, reading(exact_engine), []
    limits = [11, 25, 1, 17, 30]
    chat = Conversation(noting, policy, positions=positions, prefill_chunk=16)
    next_ids = chat._next_ids
    monkeypatch.setattr(chat, "_next_ids", lambda *what: parts.append(next_ids(*what)) or parts[-1])
    replies, after = [], []
    for text, limit in zip(SAY, limits, strict=True):
        chat.options["max_new_tokens"] = limit
        before = len(noting.model.tokens)
        replies.append(chat.say(text).sequences[0].token_ids)
        after.append(held(chat.cache))
        check_whole(chat.cache)
        # Only what is new goes through the model: what was said, and the reply but its last token.
        assert len(noting.model.tokens) - before == len(parts[-1]) + len(replies[-1]) - 1
        assert chat.cache.seen == [len(noting.model.tokens)]
    text = wording(engine, list(zip(SAY, replies, strict=True)))
    assert noting.model.tokens == text[: len(noting.model.tokens)]
    expected = token_by_token(engine, policy, parts, limits, positions, chat.cache.prompt)
    assert replies == expected[0]
    assert after == expected[1]
    if policy.name != "full":
        assert chat.cache.held < len(noting.model.tokens) * len(chat.cache.layers)


def test_without_pruning_a_turn_replies_as_to_the_whole_text(engine):
    """With the full cache, the reply to a turn is that to a prompt of all that came before it."""
    chat, turns = Conversation(engine, FullKV(), "Be brief.", max_new_tokens=12), []
    for text in SAY:
        so_far = wording(engine, turns, "Be brief.")
        asked = wording(engine, [(text, [END_ID])])
        asked = asked[: asked.index(END_ID, -2)]  # less the reply's end and the line's
        reply = chat.say(text).sequences[0].token_ids
        fresh = engine.generate([so_far + asked], max_new_tokens=12).sequences[0].token_ids
        assert reply == fresh
        turns.append((text, reply))


@pytest.mark.parametrize("name", ["lethe", "h2o", "snapkv", "streaming"])
@pytest.mark.parametrize("protect", [True, False])
def test_the_first_turn_is_generate(engine, name, protect):
    """The same tokens, the same positions kept, the same protection of the prompt."""
    policy = make(POLICIES[name], protect_prompt=protect, budget=70)
    options = {"max_new_tokens": 60, "temperature": 1.0, "seed": 3, "ignore_eos": True}
    chat, kept = Conversation(engine, policy, **options), []
    mine = chat.say(SAY[0])
    plain = engine.generate(
        [SAY[0]], policy, on_step=lambda cache: kept.append(held(cache)), **options
    )
    assert mine.sequences == plain.sequences
    assert held(chat.cache) == kept[-1]
    assert mine.stats.rounds == plain.stats.rounds > 0


def scripted(monkeypatch, *replies):
    """The model's next tokens, whatever its logits say."""
    script = iter([token for reply in replies for token in reply])
    monkeypatch.setattr(lethe_mini.engine, "sample", lambda *_: torch.tensor([next(script)]))


@pytest.mark.parametrize("last", [END_ID, OTHER_END, 65])
@pytest.mark.parametrize("policy", [FullKV(), CASES["lethe"]], ids=["full", "lethe"])
def test_a_reply_ends_once(monkeypatch, engine, policy, last):
    """Ended by the template's own mark, by another end of text, or by its length: every token of
    the reply is read once, and the mark follows it once."""
    turns = [(SAY[0], [66, 67, last]), (SAY[1], [last]), (SAY[2], [68, last]), (SAY[3], [69, 65])]
    scripted(monkeypatch, *(reply for _, reply in turns))
    noting = reading(engine)
    chat = Conversation(noting, policy, "Be brief.")
    for text, reply in turns:
        chat.options["max_new_tokens"] = len(reply)
        one = chat.say(text).sequences[0]
        assert one.token_ids == reply
        assert one.finish_reason == ("length" if reply[-1] == 65 else "stop")
    seen = noting.model.tokens
    text = wording(engine, turns, "Be brief.")
    assert seen == text[: len(seen)]
    # Not read yet: the last reply's last token, the mark and the end of the line.
    assert len(text) - len(seen) == 3


def test_a_model_without_a_template_just_goes_on(tmp_path):
    """What is said follows the last token of the reply, with no special token in between."""
    folder = tiny.folder(tmp_path / "plain", template=None)
    noting = reading(Engine.from_pretrained(str(folder), device="cpu", dtype="float32"))
    chat, tokens = Conversation(noting, CASES["lethe"], max_new_tokens=9, ignore_eos=True), []
    for text in SAY:
        tokens += noting.text.encode(text)
        tokens += chat.say(text).sequences[0].token_ids
    assert noting.model.tokens == tokens[:-1]
    assert chat.stats().endswith("MB of keys and values")


# -- commands --------------------------------------------------------------------------------------


def talk(monkeypatch, capsys, folder, *lines, options=()):
    """Runs the command on these lines of standard input. -> (exit code, output, errors)"""
    data = b"".join(line if isinstance(line, bytes) else line.encode() + b"\n" for line in lines)
    stdin = io.TextIOWrapper(io.BytesIO(data), encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", stdin)
    argv = ["--interactive", "--model", str(folder), "--device", "cpu", "--dtype", "float32"]
    code = main([*argv, "--max-new-tokens", "12", *options])
    shown = capsys.readouterr()
    return code, shown.out, shown.err


PRUNE = ("--lethe", "--budget", "47", "--interval", "5", "--no-protect-prompt")
STATS = re.compile(r"^(\d+) turns, (\d+) tokens seen, (\d+) held .*$", re.MULTILINE)


def test_commands(monkeypatch, capsys, folder):
    """/stats counts turns and tokens, /reset forgets them all, so that the same words get the same
    reply again; an unknown command shows what there is; /exit ends, whatever follows."""
    lines = ["/stats", "Hello!", "/stats", "", "More?", "/stats", "/reset", "/stats", "/what"]
    lines += ["Hello!", "/stats", " /exit ", "never read"]
    code, out, err = talk(monkeypatch, capsys, folder, *lines, options=PRUNE)
    assert code == 0
    assert err.count(HELP) == 2
    assert err.replace(HELP, "").strip() == ""
    facts = [tuple(map(int, found)) for found in STATS.findall(out)]
    assert [turns for turns, *_ in facts] == [0, 1, 2, 0, 1]
    assert facts[0] == facts[3] == (0, 0, 0)
    assert facts[1] == facts[4]
    replies = STATS.split(out)[0::4]
    assert replies[1] == replies[4]
    assert replies[1].strip() != replies[2].strip()
    assert all(kept <= 47 + 5 for _, _, kept in facts)
    assert facts[2][1] > 60


def test_the_line_of_stats_is_true(engine):
    """Turns, tokens seen, tokens held per layer, share forgotten, bytes."""
    chat = Conversation(engine, CASES["lethe"], max_new_tokens=30, ignore_eos=True)
    for text in SAY:
        chat.say(text)
    cache = chat.cache
    lengths = [layer.lengths[0] for layer in cache.layers]
    mean, size = sum(lengths) / len(lengths), sum(lengths) * 2 * 2 * 10 * 4  # H_kv 2, D 10, float32
    assert chat.stats() == (
        f"5 turns, {cache.seen[0]} tokens seen, {mean:.0f} held per layer on average "
        f"({1 - mean / cache.seen[0]:.0%} forgotten), {size / 1e6:.2f} MB of keys and values"
    )


def test_the_end_of_input_and_ctrl_c_at_the_prompt_end_the_chat(monkeypatch, capsys, folder):
    """Exit code 0, no traceback."""
    code, out, err = talk(monkeypatch, capsys, folder, "Hello!")
    assert (code, err.strip()) == (0, HELP)
    assert out.strip()

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(builtins, "input", interrupted)
    code, out, err = talk(monkeypatch, capsys, folder)
    assert (code, out, err.strip()) == (0, "", HELP)


@pytest.mark.parametrize("first", [True, False])
def test_what_is_too_long_is_one_line_of_error_and_the_chat_goes_on(tmp_path, first):
    """Beyond the model's positions: the cache stays as it was, and the next turn replies as if
    nothing had been said."""
    folder = tiny.folder(tmp_path / "short", max_position_embeddings=200)
    engine = Engine.from_pretrained(str(folder), device="cpu", dtype="float32")
    chats = [Conversation(engine, FullKV(), max_new_tokens=8) for _ in range(2)]
    for chat in chats if not first else ():
        chat.say("Hello!")
    before = held(chats[0].cache), chats[0].cache.seen, chats[0].turns
    with pytest.raises(UserError, match="tokens and the model takes"):
        chats[0].say("x" * 300)
    assert (held(chats[0].cache), chats[0].cache.seen, chats[0].turns) == before
    replies = [chat.say("Hm?").sequences for chat in chats]
    assert replies[0] == replies[1]


def test_errors_keep_the_chat_alive(monkeypatch, capsys, tmp_path):
    """Too long for the positions, no room left for a reply, bytes that are no text: one line each,
    and after /reset all is well."""
    folder = tiny.folder(tmp_path / "short", max_position_embeddings=100)
    lines = ["x" * 300, "Hello!", "y" * 60, "/stats", "/reset", "Hello!", "/stats"]
    code, out, err = talk(monkeypatch, capsys, folder, *lines)
    assert code == 0
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 2
    assert all("the model takes" in line for line in errors)
    facts = STATS.findall(out)
    assert facts[0] == facts[1]


def test_bytes_that_are_no_text_keep_the_chat_alive(monkeypatch, capsys, folder):
    """As a terminal in another encoding sends them: one line of error, then the next turn."""
    code, out, err = talk(monkeypatch, capsys, folder, b"caf\xe9\n", "Hello!", "/stats", "/exit")
    assert code == 0
    assert "error: " in err
    assert [found[0] for found in STATS.findall(out)] == ["1"]


def test_a_budget_too_small_for_what_is_said_first_is_an_error(monkeypatch, capsys, folder):
    """The first turn is protected as a prompt is; a shorter one may follow."""
    options = ("--lethe", "--budget", "64")
    code, out, err = talk(monkeypatch, capsys, folder, "x" * 99, "Hi", "/stats", options=options)
    assert code == 0
    assert err.count("error: budget 64 is too small") == 1
    assert STATS.findall(out)[0][0] == "1"


@pytest.mark.parametrize(
    "option", [("--prompt", "a"), ("--prompt-file", "f"), ("--output", "o"), ("--raw",)]
)
def test_a_chat_takes_its_prompts_from_the_terminal(monkeypatch, capsys, folder, tmp_path, option):
    """What belongs to batches is refused."""
    monkeypatch.chdir(tmp_path)
    Path("f").write_text("a prompt\n", encoding="utf-8")
    code, _, err = talk(monkeypatch, capsys, folder, options=option)
    assert code == 2
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("think", [True, False, None])
def test_every_turn_is_told_whether_to_think(tmp_path, think):
    """What is read is what the template writes for the whole conversation."""
    model = Engine.from_pretrained(str(tiny.folder(tmp_path, template=tiny.THINKING)), "cpu")
    noting = reading(model)
    chat = Conversation(noting, FullKV(), "Be brief.", think, max_new_tokens=6, ignore_eos=True)
    for text in SAY[:3]:
        chat.say(text)
    read = model.text.pieces(noting.model.tokens)
    heads = "".join(read).split(f"{tiny.START}assistant\n")[1:]
    empty = "<think>\n\n</think>\n\n"
    assert [head.startswith(empty) for head in heads] == [think is False] * 3
    with pytest.raises(UserError, match="no switch for thinking"):
        Conversation(Engine.from_pretrained(str(tiny.folder(tmp_path / "b")), "cpu"), FullKV(),
                     think=True)  # fmt: skip


# -- Ctrl-C ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", [0, 1, 5, 10, 30, 61])
@pytest.mark.parametrize("name", ["full", "lethe", "snapkv"])
@pytest.mark.parametrize("chunk", [16, 512])
def test_ctrl_c_loses_nothing_and_reads_nothing_twice(monkeypatch, engine, name, call, chunk):
    """The signal comes while a layer is being written, in what was said or in the reply: the step
    is finished in all layers, and after the next turn the model has read the whole conversation,
    every token once."""
    noting = reading(engine)
    options = {"max_new_tokens": 40, "ignore_eos": True, "prefill_chunk": chunk}
    chat = Conversation(noting, CASES[name], **options)
    turns = [(SAY[0], chat.say(SAY[0]).sequences[0].token_ids)]
    place, calls = LayerCache.place, []

    def interrupted(self, *args):
        done = place(self, *args)
        calls.append(self.index)
        if len(calls) == call + 1:
            os.kill(os.getpid(), signal.SIGINT)
        return done

    before = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        patch.setattr(LayerCache, "place", interrupted)
        one = chat.say(SAY[2]).sequences[0]
    assert signal.getsignal(signal.SIGINT) is before
    assert one.finish_reason == "interrupted"
    assert len(calls) == 3 * (call // 3 + 1)
    check_whole(chat.cache)
    turns.append((SAY[2], one.token_ids))
    turns.append((SAY[3], chat.say(SAY[3]).sequences[0].token_ids))
    check_whole(chat.cache)
    assert noting.model.tokens == wording(engine, turns)[: len(noting.model.tokens)]
    assert chat.cache.seen == [len(noting.model.tokens)]


@pytest.mark.parametrize("count", [1, 7])
def test_a_callback_may_stop_a_reply(engine, count):
    """KeyboardInterrupt from on_token: the same law."""
    noting, shown = reading(engine), []

    def on_token(_, token):
        shown.append(token)
        if len(shown) == count:
            raise KeyboardInterrupt

    chat = Conversation(noting, CASES["lethe"], max_new_tokens=20, ignore_eos=True)
    turns = [(SAY[0], chat.say(SAY[0], on_token).sequences[0].token_ids)]
    assert turns[0][1] == shown
    assert len(shown) == count
    turns.append((SAY[1], chat.say(SAY[1]).sequences[0].token_ids))
    assert noting.model.tokens == wording(engine, turns)[: len(noting.model.tokens)]
    check_whole(chat.cache)


@pytest.mark.skipif(sys.platform == "win32", reason="SIGINT of Unix")
def test_ctrl_c_stops_a_reply_of_the_command_and_the_next_turn_works(folder):
    """A real process and a real signal amid an endless reply; then statistics, another turn, exit
    code 0 and no traceback."""
    argv = ["--interactive", "--model", folder, *PRUNE, "--device", "cpu", "--dtype", "float32"]
    argv += ["--ignore-eos", "--max-new-tokens", 3500]
    pipe = subprocess.PIPE
    with tiny.command(*argv, stdin=pipe, stdout=pipe, stderr=pipe) as run:

        def until(done):
            shown = b""
            while not done(shown) and (more := os.read(run.stdout.fileno(), 1)):
                shown += more
            return shown.decode(errors="replace")

        seen = []
        for text in (b"Hello!\n", b"And now?\n"):
            run.stdin.write(text)
            run.stdin.flush()
            assert until(lambda shown: len(shown) == 40)
            run.send_signal(signal.SIGINT)
            run.stdin.write(b"/stats\n")
            run.stdin.flush()
            shown = until(lambda shown: shown.endswith(b"of keys and values\n"))
            seen += [tuple(map(int, found)) for found in STATS.findall(shown)]
        _, err = run.communicate(b"/exit\n", timeout=60)
    assert run.returncode == 0
    assert err.decode().strip() == HELP
    assert [turns for turns, *_ in seen] == [1, 2]
    assert 40 < seen[0][1] < seen[1][1] < 2500
