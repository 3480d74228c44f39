"""Text: whole characters from any ids, chat templates that cannot reach out, the ends of a text."""

import json
import math
import re

import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from lethe_mini.checkpoint.text import Text
from lethe_mini.errors import UserError
from lethe_mini.generation.sampling import Sampling

WORDS = ["the", "cache", " key", "naïve", "€", "日本", "👩‍🚀", "\ufffd"]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def byte_level():
    """As in Qwen2 and Llama 3: every byte has a token, and a few words have one, too."""
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    vocab = {char: index for index, char in enumerate(sorted(level.alphabet()))}
    merges = []
    for word in WORDS:
        symbols = [*level.pre_tokenize_str(word)[0][0]]
        while len(symbols) > 1:
            pair, symbols = symbols[:2], ["".join(symbols[:2]), *symbols[2:]]
            if symbols[0] not in vocab:
                vocab[symbols[0]] = len(vocab)
                merges.append(tuple(pair))
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer, tokenizer.decoder = level, decoders.ByteLevel()
    return tokenizer


def sentence_piece():
    """As in Llama 2: `▁` for a space, one more in front, and bytes for what has no token."""
    vocab = {"<unk>": 0} | {f"<0x{byte:02X}>": byte + 1 for byte in range(256)}
    for piece in ["▁", "▁▁", "▁the", "▁key", "the", "a", "b", "é", "€", "\ufffd"]:
        vocab[piece] = len(vocab)
    merges = [("▁", "▁")]
    model = models.BPE(
        vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return tokenizer


def metaspace():
    tokenizer = sentence_piece()
    tokenizer.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(), decoders.Fuse()]
    )
    return tokenizer


def with_specials(tokenizer):
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    bos = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    return tokenizer


def write(folder, tokenizer=None, **files):
    """A model folder: `config={...}` becomes config.json."""
    folder.mkdir(exist_ok=True)
    with_specials(tokenizer or byte_level()).save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


BUILDERS = {"byte_level": byte_level, "sentence_piece": sentence_piece, "metaspace": metaspace}


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    root = tmp_path_factory.mktemp("tokenizers")
    return {name: Text(write(root / name, build())) for name, build in BUILDERS.items()}


@pytest.fixture
def chatty(tmp_path):
    """A factory of Text with the given template, and `<s>`, `</s>` as its special tokens."""

    def build(template, **settings):
        settings = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, **settings}
        return Text(write(tmp_path / "m", tokenizer_config={"chat_template": template, **settings}))

    return build


def one_line(error):
    return len(str(error.value).splitlines()) == 1


# --- encode, decode


@pytest.mark.parametrize("kind", BUILDERS)
@given(text=st.text(max_size=40))
def test_decode_undoes_encode(texts, kind, text):
    text = text.replace("▁", "_")  # SentencePiece's space, which it cannot tell from one
    text = re.sub("<(?=s>|/s>|think>)", "", text)
    ids = texts[kind].encode(text)
    assert texts[kind].decode(ids) == text
    assert ids[1:] == texts[kind].encode(text, add_special_tokens=False)


def test_a_prompt_is_never_cut_or_padded(tmp_path):
    tokenizer = byte_level()
    tokenizer.enable_truncation(max_length=3)
    tokenizer.enable_padding(length=50)
    text = Text(write(tmp_path / "m", tokenizer))
    assert text.decode(text.encode("abcdefgh")) == "abcdefgh"
    assert len(text.encode("abcdefgh")) == 9


def test_ids_that_only_the_models_padded_vocabulary_has_decode_to_nothing(texts):
    text = texts["byte_level"]
    ids = text.encode("ab")
    assert text.decode([ids[1], 99_999, ids[2]]) == "ab"
    stream = text.stream()
    assert [stream.push(id) for id in (ids[1], 99_999, ids[2])] == ["a", "", "b"]


def test_a_text_with_stray_surrogates_is_one_line(texts):
    with pytest.raises(UserError, match="not valid Unicode") as caught:
        texts["byte_level"].encode("a\udcff")
    assert one_line(caught)


# --- streaming


def streamed(text, ids):
    stream = text.stream()
    pushed = [stream.push(id) for id in ids]
    return pushed, stream.flush()


@st.composite
def any_ids(draw, text):
    """Ids in an order no text would give: stray bytes, special tokens, ids beyond the end."""
    size = text._tokenizer.get_vocab_size()
    pieces = st.sampled_from(text.encode("ß𝄞漢😀", add_special_tokens=False))  # bytes in them all
    return draw(st.lists(st.integers(0, size + 1) | pieces | st.integers(size - 16, size)))


@pytest.mark.parametrize("kind", BUILDERS)
@given(data=st.data())
def test_the_pieces_of_any_ids_add_up_to_decode(texts, kind, data):
    ids = data.draw(any_ids(texts[kind]))
    pushed, rest = streamed(texts[kind], ids)
    assert "".join(pushed) + rest == texts[kind].decode(ids)


@pytest.mark.parametrize("kind", BUILDERS)
@given(text=st.text(st.sampled_from("a the€é👩‍🚀日\n"), max_size=120))
def test_the_pieces_of_a_text_add_up_to_it(texts, kind, text):
    ids = texts[kind].encode(text)
    pushed, rest = streamed(texts[kind], ids)
    assert "".join(pushed) + rest == texts[kind].decode(ids)
    assert "\ufffd" not in "".join(pushed)


@given(text=st.text(max_size=40))
def test_every_character_comes_with_the_token_that_completes_it(texts, text):
    text = text.replace("\ufffd", "")  # looks like an unfinished one, and so waits for the next
    ids = texts["byte_level"].encode(text, add_special_tokens=False)
    stream, out = texts["byte_level"].stream(), ""
    for count, id in enumerate(ids, 1):
        out += stream.push(id)
        assert out == texts["byte_level"].decode(ids[:count]).rstrip("\ufffd")
    assert stream.flush() == ""


@pytest.mark.parametrize("kind", BUILDERS)
def test_a_broken_sequence_waits_and_comes_out_at_the_end(texts, kind):
    ids = texts[kind].encode("a😀", add_special_tokens=False)
    pushed, rest = streamed(texts[kind], ids[:-1])
    assert "".join(pushed) == "a"
    assert set(rest) == {"\ufffd"}
    assert "a" + rest == texts[kind].decode(ids[:-1])


def test_a_run_of_byte_tokens_that_ends_badly_is_not_sent_early(texts):
    # The whole run decodes to U+FFFD, the euro sign in its first three bytes included.
    text = texts["sentence_piece"]
    ids = [text._tokenizer.token_to_id(f"<0x{byte}>") for byte in ("E2", "82", "AC", "FF")]
    ids.append(text._tokenizer.token_to_id("a"))
    assert streamed(text, ids) == (["", "", "", "", "\ufffd" * 4 + "a"], "")


def test_specials_inside_a_character_change_nothing(texts):
    text = texts["byte_level"]
    euro = [text._tokenizer.token_to_id(char) for char in "âĤ¬"]  # its three bytes
    end = text._tokenizer.token_to_id("</s>")
    assert streamed(text, [euro[0], end, euro[1], end, euro[2]]) == (["", "", "", "", "€"], "")


@pytest.mark.parametrize("kind", BUILDERS)
def test_the_window_stays_short_over_a_long_text(texts, kind):
    text = texts[kind]
    said = "the key € 日本 👩‍🚀 " * 50
    stream, out, longest = text.stream(), "", 0
    for id in text.encode(said) + [text._tokenizer.token_to_id("b")] * 40:
        out += stream.push(id)
        longest = max(longest, len(stream._ids))
    assert out + stream.flush() == said + "b" * 40
    assert longest < 64


def test_the_window_stays_short_over_endless_garbage(texts):
    text = texts["byte_level"]
    stray = text._tokenizer.token_to_id("Ĥ")  # a continuation byte that continues nothing
    stream, out = text.stream(), ""
    for _ in range(500):
        out += stream.push(stray)
        assert len(stream._ids) < 64
    assert out + stream.flush() == "\ufffd" * 500


def test_two_streams_do_not_share_state(texts):
    one, two = texts["byte_level"].stream(), texts["byte_level"].stream()
    ids = texts["byte_level"].encode("é", add_special_tokens=False)
    assert [one.push(ids[0]), two.push(ids[0])] == ["", ""]
    assert [one.push(ids[1]), two.push(ids[1])] == ["é", "é"]


# --- the chat template


def test_the_template_gets_messages_special_tokens_and_the_generation_prompt(chatty):
    text = chatty(TEMPLATE)
    assert text.has_template
    assert text.chat([{"role": "user", "content": "hi"}]) == "<s><user>hi</s><assistant>"


def test_prompts_go_through_the_template_without_a_second_bos(chatty):
    text = chatty(TEMPLATE)
    expected = "<s><system>be brief</s><user>hi</s><assistant>"
    assert text.encode_prompt("hi", system="be brief") == text.encode(expected, False)
    assert text.encode_prompt("hi", raw=True) == text.encode("hi", True)
    assert text.encode_prompt("hi")[0] == text.encode("hi")[0]


def test_a_template_that_cannot_be_read_is_one_line(tmp_path):
    (write(tmp_path / "m") / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"chat_template\.jinja cannot be read") as caught:
        Text(tmp_path / "m")
    assert one_line(caught)


def test_templates_see_what_transformers_gives_them(chatty):
    assert chatty("{{ messages | tojson }}").chat([{"a": "<é>'"}]) == '[{"a": "<é>\'"}]'
    assert chatty("{{ [1] | tojson(indent=1) }}").chat([]) == "[\n 1\n]"
    assert re.fullmatch(r"20\d\d", chatty("{{ strftime_now('%Y') }}").chat([]))
    assert chatty("{% for i in [1, 2] %}{% break %}{% endfor %}ok").chat([]) == "ok"
    assert chatty("a\n  {% if true %}\nb\n  {% endif %}\nc").chat([]) == "a\nb\nc"
    assert chatty("{{ tools is none }}").chat([]) == "True"
    assert chatty("{{ eos_token is defined }}", eos_token=None).chat([]) == "False"


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os }}",
        "{{ lipsum.__globals__['os'].popen('id').read() }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ strftime_now.__code__.co_consts }}",
        "{% set f = '{0.__class__.__mro__}'.format %}{{ f(1) }}",
        "{{ [1] | map(attribute='__class__.__base__') | list }}",
        "{{ messages.append(1) }}",
        "{{ messages.clear() }}",
        "{{ messages[0].update({'role': 'system'}) }}",
        "{{ range(10 ** 9) | list }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
    ],
)
def test_a_template_cannot_leave_the_sandbox_or_change_the_messages(chatty, template):
    messages = [{"role": "user", "content": "hi"}]
    with pytest.raises(UserError, match="chat template failed") as caught:
        chatty(template).chat(messages)
    assert one_line(caught)
    assert messages == [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    ("template", "match"),
    [
        ("{{ raise_exception('roles\n must alternate') }}", "TemplateError: roles must alternate"),
        ("{% if %}", "TemplateSyntaxError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ messages.nothing.here }}", "UndefinedError"),
        ("{{ messages | tojson | int + 'a' }}", "TypeError"),
    ],
)
def test_a_template_that_fails_is_one_line(chatty, template, match):
    with pytest.raises(UserError, match=match) as caught:
        chatty(template).chat([{"role": "user", "content": "hi"}])
    assert one_line(caught)


@pytest.mark.parametrize("raw", [True, False])
def test_a_system_text_without_a_template_is_refused(chatty, raw):
    text = chatty(TEMPLATE if raw else None)
    with pytest.raises(UserError, match="a system text needs a chat template"):
        text.encode_prompt("hi", system="be brief", raw=raw)


def test_without_a_template_a_prompt_is_plain_text_and_chat_is_refused(chatty):
    text = chatty(None)
    assert text.encode_prompt("hi") == text.encode("hi")
    with pytest.raises(UserError, match="no chat template"):
        text.chat([])


def test_a_prompt_without_a_single_token_is_refused(chatty):
    with pytest.raises(UserError, match="the prompt is empty"):
        chatty("").encode_prompt("hi")


# --- messages


# Templates as they are on the hub: one that writes an end token, one that trims, one with a space
# before the end token, one whose head opens a thought and that drops thoughts (R1), one as Qwen3's.
TEMPLATES = {
    "plain": TEMPLATE,
    "trims": "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content | trim }}\n"
    "{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}",
    "spaced": "{% for m in messages %}<{{ m.role }}> {{ m.content.strip() }} {{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}<assistant> {% endif %}",
    "drops": "{% for m in messages %}<{{ m.role }}>{{ m.content.split('</think>')[-1] }}"
    "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}<assistant><think>\n{% endif %}",
    "thinks": tiny.THINKING,
}
USER = {"role": "user", "content": "Why is 7 prime?"}
SYSTEM = {"role": "system", "content": "Be brief."}


def reply(content, **more):
    return {"role": "assistant", "content": content, **more}


TALKS = {
    "question": [USER],
    "system": [SYSTEM, USER],
    "turns": [USER, reply("<think>\nhm\n</think>\n\nBecause."), {**USER, "content": "né €? "}],
    "tool": [USER, reply("a", reasoning_content="b"), {**USER, "content": "<tool>4</tool>"}],
    "continued": [USER, reply("Seven is")],
    "continued-space": [SYSTEM, USER, reply("  Seven has ")],
    "continued-line": [USER, reply("Seven\n\n")],
    "continued-empty": [USER, reply("")],
    "continued-twice": [USER, reply("Seven is"), USER, reply("Seven is")],
    "continued-thought": [USER, reply("<think>\nhm\n</think>\n\nSeven")],
    "continued-reasoning": [USER, reply("Seven", reasoning_content="hm")],
    "assistant-first": [reply("Hello."), USER],
    "assistant-only": [reply("Once upon")],
}


def by_transformers(template, messages, **options):
    """The same prompt, as transformers renders it."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=with_specials(byte_level()),
        bos_token="<s>",
        eos_token="</s>",
        chat_template=template,
    )
    if messages[-1]["role"] == "assistant":
        options["continue_final_message"] = True
    else:
        options["add_generation_prompt"] = True
    return tokenizer.apply_chat_template(messages, tokenize=False, **options)


@pytest.mark.parametrize("messages", TALKS.values(), ids=TALKS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_messages_are_rendered_as_transformers_renders_them(chatty, name, messages):
    """The last one too, where it is the assistant's and is continued."""
    text = chatty(TEMPLATES[name])
    if name == "drops" and messages is TALKS["continued-thought"]:
        with pytest.raises(ValueError, match="final message does not appear"):
            by_transformers(TEMPLATES[name], messages)
        return
    expected = by_transformers(TEMPLATES[name], messages)
    assert text.chat(messages) == expected
    assert text.encode_prompt(messages) == text.encode(expected, add_special_tokens=False)
    if messages[-1]["role"] == "assistant":
        assert expected.rstrip().endswith(messages[-1]["content"].strip())


@given(content=st.text(st.sampled_from("a€ \n<>/\u2028"), max_size=9))
@pytest.mark.parametrize("name", TEMPLATES)
def test_any_text_is_continued_as_transformers_continues_it(continuing, name, content):
    messages = [USER, reply(content)]
    assert continuing[name].chat(messages) == by_transformers(TEMPLATES[name], messages)


@pytest.fixture(scope="module")
def continuing(tmp_path_factory):
    root, names = tmp_path_factory.mktemp("templates"), {"bos_token": "<s>", "eos_token": "</s>"}
    return {
        name: Text(write(root / name, tokenizer_config={"chat_template": template, **names}))
        for name, template in TEMPLATES.items()
    }


@pytest.mark.parametrize(
    "content",
    [
        "<think>",
        "<think>\nLet me see",
        "<think>Let me ",
        "\n<think>\nA line.\n\n",
        "I <think> so",
        "<think>a</think>Seven",  # a thought that both templates would change
        "<think>a</think>b<think>c",
    ],
)
@pytest.mark.parametrize("name", ["drops", "thinks"])
def test_an_open_thought_is_continued_as_it_stands(chatty, name, content):
    """Without an empty thought before it, and without a second opening of the same thought."""
    text = chatty(TEMPLATES[name])
    head = text.chat([USER]).removesuffix("<think>\n")
    assert text.chat([USER, reply(content)]) == head + content


def test_the_end_of_a_thought_follows_the_head_that_opens_it(chatty):
    """The template would drop the thought, and a head that opens one stays as it is."""
    text, content = chatty(TEMPLATES["drops"]), "It is odd.\n</think>\nSeven"
    assert text.chat([USER, reply(content)]) == text.chat([USER]) + content


def test_a_template_that_leaves_out_the_last_message_does_not_lose_it(chatty):
    text = chatty("{{ messages[0].content }}{% if add_generation_prompt %} -> {% endif %}")
    assert text.chat([USER, reply("Seven")]) == "Why is 7 prime? -> Seven"


def test_messages_are_left_as_they_are(chatty):
    """They may be a tuple, and hold what only the template reads."""
    text = chatty("{% for m in messages %}{{ m.mood | tojson }}{{ m.content }}{% endfor %}")
    messages = ({**SYSTEM, "mood": ["é"]}, {**USER, "mood": 1}, reply("So", mood=""))
    before = json.dumps(messages)
    assert text.decode(text.encode_prompt(messages)) == '["é"]Be brief.1Why is 7 prime?""So'
    assert json.dumps(messages) == before


def test_a_system_text_goes_before_messages_that_have_none(chatty):
    text = chatty(TEMPLATE)
    assert text.encode_prompt([USER], "Be brief.") == text.encode_prompt([SYSTEM, USER])
    with pytest.raises(UserError, match="have a system text already"):
        text.encode_prompt([SYSTEM, USER], "Be brief.")
    with pytest.raises(UserError, match="have a system text already"):
        text.encode_prompt([USER, SYSTEM], "")


@pytest.mark.parametrize(
    ("messages", "match"),
    [
        ([], "the list of messages is empty"),
        ([{"content": "a"}], "has no role"),
        ([USER, {"role": "user"}], "has no content"),
        ([{"role": 1, "content": "a"}], "role should be a string, not 1"),
        ([{"role": "user", "content": None}], "content should be a string, not None"),
        ([{"role": "user", "content": [{"type": "text"}]}], r"content should .* not \[{'type'"),
        ([USER, "a"], "should have role and content, not be 'a'"),
        ([{"role": "tool", "content": "a"}], 'no role is called "tool"'),
        ([{"role": "user", "content": "\ud800"}], "not valid Unicode"),
        ([reply("<think>")], "there should be a message"),
    ],
)
def test_what_are_no_messages_is_one_line(chatty, messages, match):
    with pytest.raises(UserError, match=match) as caught:
        chatty(tiny.THINKING).encode_prompt(messages)
    assert one_line(caught)


@pytest.mark.parametrize("raw", [True, False])
def test_messages_without_a_template_are_refused(chatty, raw):
    text = chatty(TEMPLATE if raw else None)
    with pytest.raises(UserError, match="messages need a chat template") as caught:
        text.encode_prompt([USER], raw=raw)
    assert one_line(caught)


# --- thinking


@pytest.mark.parametrize("messages", TALKS.values(), ids=TALKS)
@pytest.mark.parametrize("think", [True, False, None])
def test_thinking_is_switched_as_transformers_switches_it(chatty, messages, think):
    """On, off, and left to the template, which can tell that from both."""
    template = tiny.THINKING + "{{ enable_thinking is defined }}"
    options = {} if think is None else {"enable_thinking": think}
    text, expected = chatty(template), by_transformers(template, messages, **options)
    assert text.chat(messages, think) == expected
    ids = text.encode(expected, add_special_tokens=False)
    assert text.encode_prompt(messages, think=think) == ids


def test_without_thinking_the_prompt_holds_an_empty_thought(chatty):
    text, empty = chatty(tiny.THINKING), "<think>\n\n</think>\n\n"
    assert text.chat([USER], False) == text.chat([USER], True) + empty
    assert text.chat([USER], True) == text.chat([USER])
    begun = [USER, reply("<think>Seven")]
    assert text.chat(begun, False) == text.chat(begun, True)  # the thought that is there counts


@pytest.mark.parametrize(
    ("template", "think", "raw", "match"),
    [
        (TEMPLATE, True, False, "this model has no switch for thinking"),
        (TEMPLATE, False, False, "this model has no switch for thinking"),
        ("{% set enable_thinking = true %}{{ enable_thinking }}", False, False, "no switch for"),
        ("{# enable_thinking #}", True, False, "no switch for thinking"),
        (tiny.THINKING, True, True, "--think and --no-think need a chat template, and --raw"),
        (
            None,
            False,
            False,
            "--think and --no-think need a chat template, and this model has none",
        ),
        (tiny.THINKING, "yes", False, "think should be True, False or None, not 'yes'"),
        (tiny.THINKING, 1, False, "think should be True, False or None, not 1"),
        ("{% if %}", True, False, "chat template failed"),
    ],
)
def test_a_model_that_cannot_be_told_about_thinking_is_one_line(
    chatty, template, think, raw, match
):
    with pytest.raises(UserError, match=match) as caught:
        chatty(template).encode_prompt("hi", raw=raw, think=think)
    assert one_line(caught)


# --- the ids that end a text


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        (7, None, {7}),
        ([7, 8], 289, {7, 8, 289}),
        (None, [9], {9}),
        (7, 7, {7}),
        (0, None, {0}),
    ],
)
def test_eos_comes_from_both_files(tmp_path, generation, config, expected):
    files = {
        "generation_config": {"eos_token_id": generation},
        "config": {"eos_token_id": config},
    }
    assert Text(write(tmp_path / "m", **files)).eos_ids == frozenset(expected)


@pytest.mark.parametrize("token", ["</s>", {"content": "</s>", "special": True}])
def test_eos_falls_back_to_the_tokenizers(tmp_path, token):
    text = Text(write(tmp_path / "m", tokenizer_config={"eos_token": token}, config={}))
    assert text.eos_ids == {text.encode("</s>", False)[0]}


@pytest.mark.parametrize("settings", [{}, {"eos_token": None}, {"eos_token": ""}])
def test_a_model_may_have_no_eos(tmp_path, settings):
    assert Text(write(tmp_path / "m", tokenizer_config=settings)).eos_ids == frozenset()


@pytest.mark.parametrize("value", ["</s>", [1, "2"], {"a": 1}, True, 1.5])
def test_an_eos_that_is_no_number_is_one_line(tmp_path, value):
    with pytest.raises(UserError, match="eos_token_id should be") as caught:
        Text(write(tmp_path / "m", config={"eos_token_id": value}))
    assert one_line(caught)


# --- damaged folders


def test_a_missing_tokenizer_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"tokenizer\.json is missing"):
        Text(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "{}", "[]", '{"model": {"type": "Nope"}}'])
def test_a_damaged_tokenizer_is_one_line(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match="is no tokenizer") as caught:
        Text(tmp_path)
    assert one_line(caught)


# --- the sampling that generation_config.json asks for


@pytest.mark.parametrize(
    ("said", "sampling"),
    [
        ({}, {}),
        ({"temperature": 0.6, "top_p": 0.9, "top_k": 5}, {}),
        ({"do_sample": False, "temperature": "hot"}, {}),
        ({"do_sample": None, "top_k": 5}, {}),
        ({"do_sample": True}, {"temperature": 1.0}),
        ({"do_sample": True, "temperature": None, "top_p": 1}, {"temperature": 1.0, "top_p": 1}),
        ({"do_sample": True, "temperature": 0}, {"temperature": 0}),
        ({"do_sample": True, "top_k": 0, "min_p": 0.1}, {"temperature": 1.0, "top_k": 0}),
        (
            {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95},
            {"temperature": 0.6, "top_p": 0.95, "top_k": 20},
        ),
    ],
)
def test_sampling_is_what_generation_config_says(tmp_path, said, sampling):
    """Where it says do_sample; what it leaves out is off, but for a temperature of 1."""
    text = Text(write(tmp_path / "m", generation_config=said))
    assert text.sampling == sampling
    assert text.repetition_penalty == 1
    assert Sampling(**text.sampling)
    asked = {**said, "repetition_penalty": 1.05}
    text = Text(write(tmp_path / "m", generation_config=asked))
    assert text.sampling == sampling
    assert text.repetition_penalty == (1.05 if sampling else 1)


def test_without_the_file_nothing_is_sampled(tmp_path):
    text = Text(write(tmp_path / "m"))
    assert (text.sampling, text.repetition_penalty) == ({}, 1)


@pytest.mark.parametrize("value", ["0.6", math.nan, -1, math.inf, True, [1], {"a": "\n"}])
@pytest.mark.parametrize("name", ["temperature", "top_p", "top_k", "repetition_penalty"])
def test_a_bad_value_is_one_line_with_the_file_and_the_key(tmp_path, name, value):
    with pytest.raises(UserError, match=rf"generation_config\.json: {name} should be a") as caught:
        Text(write(tmp_path / "m", generation_config={"do_sample": True, name: value}))
    assert one_line(caught)


@pytest.mark.parametrize(
    ("name", "value"),
    [("top_p", 0), ("temperature", 10**400), ("top_p", 1.01), ("top_k", 2.5),
     ("repetition_penalty", 0), ("do_sample", 1), ("do_sample", "true"), ("do_sample", [])],
)  # fmt: skip
def test_a_value_out_of_range_is_one_line_too(tmp_path, name, value):
    with pytest.raises(UserError, match=f"{name} should be") as caught:
        Text(write(tmp_path / "m", generation_config={"do_sample": True, name: value}))
    assert one_line(caught)


@pytest.mark.parametrize("name", ["tokenizer_config", "config", "generation_config"])
def test_damaged_settings_are_one_line(tmp_path, name):
    folder = write(tmp_path / "m")
    (folder / f"{name}.json").write_text("{")
    with pytest.raises(UserError, match=f"{name}.json is not JSON"):
        Text(folder)


def test_a_tokenizer_that_cannot_read_a_text_is_one_line(tmp_path):
    """Its unknown token is not in its vocabulary: it fails at the first unknown word."""
    tokenizer = Tokenizer(models.WordLevel({"a": 0}, unk_token="[UNK]"))
    folder = tmp_path / "m"
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    with pytest.raises(UserError, match="cannot read a text") as caught:
        Text(folder).encode("b")
    assert len(str(caught.value).splitlines()) == 1
