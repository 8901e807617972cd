"""Thoughts: trained as the replies they are, asked for as a server asks, kept or dropped as the template does."""

import dataclasses
import itertools

import pytest
from helpers.chats import build_chat_tokenizer, encode_row
from helpers.thinking import KINDS, PUBLISHED, SMALL
from jinja2 import TemplateError

from utils.prompts.answer_spans import split_chat
from utils.prompts.messages import IGNORE_INDEX, Chat
from utils.prompts.rendering import choose_thoughts

SAID = [
    ("Two and two.", "Four."),
    ("Think of Peru,\n\nthen of its capital.", "Lima."),
    ("It was Lima.", "Lima again."),
]
# Which of three answers have a thought: all, none, some.
PATTERNS = [tuple(map(bool, pattern)) for pattern in itertools.product((0, 1), repeat=3)]
# How the tokenizers of these models cut a text, Qwen's and LLaMA-3's: newlines are one piece, whatever follows.
NEWLINES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
by_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)


@pytest.fixture(scope="module")
def load(smollm2):
    """A tokenizer with the tokens and the template of a kind; each is made once."""
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split
    from transformers import AutoTokenizer

    made = {}

    def build(kind):
        if kind.name not in made:
            made[kind.name] = tokenizer = AutoTokenizer.from_pretrained(smollm2)
            split = [Split(Regex(NEWLINES), "isolated"), ByteLevel(add_prefix_space=False, use_regex=False)]
            tokenizer.backend_tokenizer.pre_tokenizer = Sequence(split)
            tokenizer.add_tokens([token for token in kind.tokens if "think>" in token])  # no special ones
            tokenizer.add_tokens(
                [token for token in kind.tokens if "think>" not in token], special_tokens=True
            )
            tokenizer.eos_token = kind.eos
        made[kind.name].chat_template = kind.read()
        return build_chat_tokenizer(made[kind.name])

    return build


def build_rows(kind, thinks):
    """(messages as data sets have them, the same as a server's client has them)"""
    rows, sent = [], []
    for i, has_thought in enumerate(thinks):
        thought, answer = SAID[i]
        asked = {"role": "user", "content": f"Question {i}?"}
        key = {"reasoning_content": thought} if has_thought else {}
        rows += [asked, {"role": "assistant", "content": answer} | key]
        sent += [asked, kind.message(thought if has_thought else None, answer)]
    return rows, sent


def serve(tokenizer, sent, thinking):
    """The prompt's token ids as a server has them: transformers' own rendering, with the documented switch."""
    switch = {} if thinking is None else {"enable_thinking": thinking}
    return tokenizer.apply_chat_template(sent, add_generation_prompt=True, return_dict=False, **switch)


def list_replies(kind, tokenizer, sent, thinks):
    """(prompt ids, reply ids) of each answer, when its turn came."""
    replies = []
    for i, has_thought in enumerate(thinks):
        text = kind.write(SAID[i][0] if has_thought else None, SAID[i][1])
        prompt = serve(tokenizer, sent[: 2 * i + 1], has_thought)
        replies.append((prompt, tokenizer(text, add_special_tokens=False).input_ids))
    return replies


def encode_chats(tokenizer, messages):
    return [
        encode_row(tokenizer.raw, row) for row in split_chat(tokenizer.raw, Chat(messages), tokenizer.stops)
    ]


def assert_trained(rows, replies):
    """Each reply is trained once, behind its prompt, and no other token is."""
    for prompt, reply in replies:
        ends = len(prompt), len(prompt) + len(reply)
        found = [
            row
            for row in rows
            if row["input_ids"][: ends[1]] == prompt + reply and row["labels"][ends[0] : ends[1]] == reply
        ]
        assert len(found) == 1
        assert found[0]["labels"][ends[0] - 1] == IGNORE_INDEX
    labels = sum(label != IGNORE_INDEX for row in rows for label in row["labels"])
    assert labels == sum(len(reply) for _, reply in replies)


def test_published_templates_are_there_or_it_is_said():
    if PUBLISHED is None:
        pytest.skip(
            "shared/data/templates is not here: the published templates are not tried, small ones are"
        )


@by_kind
@pytest.mark.parametrize("turns", [1, 3])
def test_trained_tokens_are_those_of_the_replies_and_prompts_those_of_a_server(load, kind, turns):
    tokenizer = load(kind)
    for thinks in {pattern[:turns] for pattern in PATTERNS}:
        rows, sent = build_rows(kind, thinks)
        assert_trained(encode_chats(tokenizer, rows), list_replies(kind, tokenizer.raw, sent, thinks))


@by_kind
def test_off_trains_answers_alone_and_on_those_with_thoughts_alone(load, kind):
    tokenizer, without = load(kind), (False, False, False)
    bare = list_replies(kind, tokenizer.raw, build_rows(kind, without)[1], without)
    for thinks in PATTERNS:
        rows, sent = build_rows(kind, thinks)
        replies = list_replies(kind, tokenizer.raw, sent, thinks)
        kept = [reply for reply, has_thought in zip(replies, thinks, strict=True) if has_thought]
        assert_trained(encode_chats(tokenizer, choose_thoughts(rows, "on")), kept)
        assert_trained(encode_chats(tokenizer, choose_thoughts(rows, "off")), bare)


@by_kind
@pytest.mark.parametrize("mode", ["on", "off", "auto"])
def test_a_chat_sends_what_a_server_renders(load, kind, mode):
    tokenizer = dataclasses.replace(load(kind), thinking=mode)
    thinking = {"on": True, "off": False, "auto": None}[mode]
    for thinks in PATTERNS:
        rows, sent = build_rows(kind, thinks)
        for turn in (1, 3, 5):
            assert tokenizer.encode_prompt(rows[:turn]) == serve(tokenizer.raw, sent[:turn], thinking)


@by_kind
def test_thought_as_text_and_under_any_key_is_one_thought(load, kind):
    tokenizer = load(kind)
    thought, answer = SAID[0]
    asked = {"role": "user", "content": "q"}
    texts = [
        f"<think>{thought}</think>{answer}",
        f"\n<think>\n{thought}\n</think>\n\n{answer}",
        f"{thought}\n</think>\n{answer}",
    ]
    said = [{"content": answer, key: thought} for key in ("reasoning_content", "reasoning", "thinking")]
    if tokenizer.style.is_thinking:  # elsewhere a text is left as it is
        said += [{"content": text} for text in texts]
    encoded = [encode_chats(tokenizer, [asked, {"role": "assistant"} | message]) for message in said]
    assert all(rows == encoded[0] for rows in encoded) and len(encoded[0]) == 1


@by_kind
def test_the_templates_way_is_found(load, kind):
    style = load(kind).style
    assert style.is_thinking == (bool(kind.key) or kind.switch)
    assert style.has_switch == kind.switch
    if kind.switch:
        assert style.default == (kind.default == "on")


@by_kind
@pytest.mark.parametrize("mode", ["on", "off"])
def test_mode_of_a_run_is_its_templates_default(load, kind, mode):
    """A server that says nothing of thinking, or that does, renders what this mode renders."""
    tokenizer = load(kind)
    sent = build_rows(kind, (True, False, True))[1][:5]
    expected = [serve(tokenizer.raw, sent, thinking) for thinking in (mode == "on", True, False)]
    source = tokenizer.raw.chat_template
    tuned = tokenizer.in_mode(mode)
    assert [serve(tuned.raw, sent, thinking) for thinking in (None, True, False)] == expected
    again = tuned.in_mode({"on": "off", "off": "on"}[mode]).in_mode(mode)
    assert again.raw.chat_template == tuned.raw.chat_template
    is_changed = kind.switch and kind.default != mode
    assert (tuned.raw.chat_template != source) == is_changed


@by_kind
@pytest.mark.parametrize("mode", ["on", "off"])
def test_reply_is_read_with_its_thought_in_tags(load, kind, mode):
    tokenizer = dataclasses.replace(load(kind), thinking=mode)
    thought, answer = SAID[1]
    texts = {"on": (thought, f"<think>\n{thought}\n</think>\n\n{answer}"), "off": (None, answer)}
    said, expected = texts[mode]
    written = kind.write(said, answer)
    if mode == "off" and "</think>" in written:  # no switch: the model closes the opened thought at once
        expected = f"<think>\n\n</think>\n\n{answer}"
    ids = tokenizer.raw(written, add_special_tokens=False).input_ids
    read = tokenizer.decode_reply(ids)
    assert read.replace("\n", "") == expected.replace("\n", "")
    for length in range(1, len(ids)):  # as it comes, piece by piece
        pieces = [
            tokenizer.raw.decode([token], skip_special_tokens=tokenizer.skips_special) for token in ids[:-1]
        ]
        assert "".join(tokenizer.tag(["".join(pieces[:length]), *pieces[length:]])).strip() == read
    tagged = list(tokenizer.tag(pieces))
    assert ("<think>" in "".join(tagged)) == any(piece.startswith("<think>") for piece in tagged)
    assert ("</think>" in "".join(tagged)) == any("</think>" in piece for piece in tagged)


CALL = {"type": "function", "function": {"name": "look", "arguments": {"x": 1}}}
LOOK = {"name": "look", "description": "d", "parameters": {"type": "object", "properties": {}}}
CALLED = "<tool_call>\n<function=look>\n<parameter=x>\n1\n</parameter>\n</function>\n</tool_call>"
QWEN_CALL = '<tool_call>\n{"name": "look", "arguments": {"x": 1}}\n</tool_call>'
GPT_CALL = (
    "<|channel|>analysis<|message|>{t}<|end|><|start|>assistant to=functions.look<|channel|>commentary json"
)


@pytest.mark.skipif(PUBLISHED is None, reason="shared/data/templates is not here")
@pytest.mark.parametrize(
    ("name", "call"),
    [
        (
            "qwen3",
            "<think>\n{t}\n</think>\n\n" + QWEN_CALL.replace("{", "{{").replace("}", "}}") + "<|im_end|>",
        ),
        ("qwen3_5_think", "{t}\n</think>\n\n" + CALLED + "<|im_end|>"),
        ("nemotron_3_nano", "{t}\n</think>\n" + CALLED + "\n<|im_end|>"),
        ("gptoss", GPT_CALL + '<|message|>{{"x": 1}}<|call|>'),
    ],
)
def test_thoughts_before_a_call_and_behind_its_result_are_trained(load, name, call):
    kind = next(kind for kind in KINDS if kind.name == name)
    tokenizer = load(kind)
    if name == "gptoss":  # as its generation_config.json has it
        tokenizer.raw.add_tokens(["<|call|>"], special_tokens=True)
        stop_ids = tokenizer.raw.convert_tokens_to_ids(["<|return|>", "<|call|>"])
        tokenizer = dataclasses.replace(tokenizer, stop_ids=stop_ids)
    chat = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "", "tool_calls": [CALL], "reasoning_content": "I must look."},
        {"role": "tool", "content": "seen"},
        {"role": "assistant", "content": "Seen.", "reasoning_content": "There it is."},
    ]
    rows = split_chat(tokenizer.raw, Chat(chat, [{"type": "function", "function": LOOK}]), tokenizer.stops)
    trained = [row.text[start:end] for row in rows for start, end in row.trained]
    assert trained == [call.format(t="I must look."), kind.write("There it is.", "Seen.")]


def test_small_templates_refuse_nothing():
    from transformers.utils.chat_template_utils import _compile_jinja_template

    for kind in SMALL:
        try:
            _compile_jinja_template(kind.source)
        except TemplateError as error:
            raise AssertionError(kind.name) from error
