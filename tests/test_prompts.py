"""Prompts byte for byte, labels exactly on the answers, chat prompts equal to training prompts."""

import pytest
from helpers.chats import QWEN3_LIKE, TWO_TURNS, assert_prompts_agree, decode_labels, encode_chat, encode_row

from utils.console import UserError
from utils.data.formats import read_row
from utils.prompts.answer_spans import (
    find_input_marker,
    find_stop_tokens,
    read_template,
    split_chat,
    template_names,
)
from utils.prompts.messages import IGNORE_INDEX, Chat
from utils.prompts.rendering import render_chat

STANFORD = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    "\n\n### Instruction:\n{instruction}\n\n### Response:"
)
STANFORD_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
    "\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
CHAT = (
    "A chat between a curious {who} and an artificial intelligence assistant. The assistant gives helpful, "
)
CHAT += "detailed, and polite answers to the {who}'s questions."
USER, HUMAN = CHAT.format(who="user"), CHAT.format(who="human")
# Two turns (q1, a1, q2, a2) of each template; § stands for the stop token.
GOLDEN = {
    "vanilla": "q2a2§",
    "default": USER + "\nHuman: q1\nAssistant: a1§\nHuman: q2\nAssistant: a2§",
    "alpaca": STANFORD.format(instruction="q1") + " a1§\n\n### Instruction:\nq2\n\n### Response: a2§",
    "vicuna": USER + " USER: q1 ASSISTANT: a1§USER: q2 ASSISTANT: a2§",
    "belle": "Human: q1\n\nBelle: a1§\n\nHuman: q2\n\nBelle: a2§",
    "linly": "User: q1\nBot: a1§\nUser: q2\nBot: a2§",
    "billa": "Human: q1\nAssistant: a1§\nHuman: q2\nAssistant: a2§",
    "ziya": "<human>:q1\n<bot>:a1§\n<human>:q2\n<bot>:a2§",
    "aquila": HUMAN + "###Human: q1###Assistant: a1§###Human: q2###Assistant: a2§",
    "guanaco": "### Human: q1### Assistant: a1§### Human: q2### Assistant: a2§",
    "chatml": "<|im_start|>user\nq1§\n<|im_start|>assistant\na1§\n<|im_start|>user\nq2§\n<|im_start|>assistant\na2§\n",
}
# How the templates of other families behave, written small, with SmolLM2's special tokens in place of theirs.
PHI3_LIKE = (  # <|im_end|> closes a turn, eos comes once at the very end
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}<|endoftext|>{% endif %}"
)
GLM_LIKE = (  # nothing closes an answer: it ends where the next role's token follows
    "{% for m in messages %}{% if m.role == 'user' %}<reponame>\n{{ m.content }}{% else %}"
    "<filename>\n{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}<filename>\n{% endif %}"
)
GEMMA_LIKE = (  # refuses a system message
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


def test_golden_strings_cover_every_template():
    assert sorted(GOLDEN) == template_names()


@pytest.mark.parametrize("name", GOLDEN)
def test_template_renders_its_layout_byte_for_byte(smol_tokenizer, name):
    smol_tokenizer.chat_template = read_template(name)
    assert render_chat(smol_tokenizer, TWO_TURNS) == GOLDEN[name].replace("§", "<|im_end|>")


@pytest.mark.parametrize("name", sorted(set(GOLDEN) - {"vanilla", "chatml"}))
def test_system_message_replaces_the_prefix(smol_tokenizer, name):
    smol_tokenizer.chat_template = read_template(name)
    text = render_chat(smol_tokenizer, [{"role": "system", "content": "Be brief."}, *TWO_TURNS])
    assert text.startswith("Be brief.") and USER not in text and HUMAN not in text and "Below is" not in text
    assert text.endswith(GOLDEN[name].replace("§", "<|im_end|>")[-20:])


@pytest.mark.parametrize("row", [{"input": ""}, {"input": "1, 2"}])
def test_alpaca_rows_render_stanfords_prompts(smol_tokenizer, row):
    row |= {"instruction": "Add them.", "output": "3"}
    smol_tokenizer.chat_template = read_template("alpaca")
    messages = read_row(row, "alpaca", find_input_marker(smol_tokenizer)).messages
    stanford = (STANFORD_INPUT if row["input"] else STANFORD).format_map(row)
    assert render_chat(smol_tokenizer, messages[:1], add_generation_prompt=True) == stanford
    # One space after the colon, as the training text of 2023 had it: the answer's own.
    assert render_chat(smol_tokenizer, messages) == stanford + " 3<|im_end|>"


def test_input_goes_after_a_blank_line_for_other_templates():
    row = {"instruction": "Add them.", "input": "1, 2", "output": "3"}
    assert read_row(row, "alpaca").messages[0]["content"] == "Add them.\n\n1, 2"


@pytest.mark.parametrize("name", [None, *sorted(set(GOLDEN) - {"vanilla"})])
def test_labels_cover_exactly_the_answers_and_their_stop_token(smol_tokenizer, name):
    if name:
        smol_tokenizer.chat_template = read_template(name)
    stop_ids, rows = encode_chat(smol_tokenizer, TWO_TURNS)
    blank = "" if name in (None, "ziya", "chatml") else " "  # it ends the prompt and belongs to the answer
    answers = f"{blank}a1<|im_end|>{blank}a2<|im_end|>"
    assert [decode_labels(smol_tokenizer, labels) for _, labels in rows] == [answers]
    assert_prompts_agree(smol_tokenizer, TWO_TURNS, stop_ids, rows)


def test_vanilla_trains_each_answer_without_history(smol_tokenizer):
    smol_tokenizer.chat_template = read_template("vanilla")
    stop_ids, rows = encode_chat(smol_tokenizer, TWO_TURNS)
    assert [smol_tokenizer.decode(ids) for ids, _ in rows] == ["q1a1<|im_end|>", "q2a2<|im_end|>"]
    assert_prompts_agree(smol_tokenizer, TWO_TURNS, stop_ids, rows)


def test_qwen3_like_template_gives_a_row_for_each_answer(smol_tokenizer):
    smol_tokenizer.chat_template = QWEN3_LIKE
    stop_ids, rows = encode_chat(smol_tokenizer, TWO_TURNS)
    answers = [decode_labels(smol_tokenizer, labels) for _, labels in rows]
    assert answers == ["<think>\n\n</think>\n\na1<|im_end|>", "<think>\n\n</think>\n\na2<|im_end|>"]
    assert "think" not in smol_tokenizer.decode(rows[1][0]).split("q2")[0]  # history as inference sees it
    assert_prompts_agree(smol_tokenizer, TWO_TURNS, stop_ids, rows)


def test_phi3_like_template_stops_at_the_turns_end(smol_tokenizer):
    smol_tokenizer.chat_template = PHI3_LIKE
    stop_ids, rows = encode_chat(smol_tokenizer, TWO_TURNS, eos_ids=[0])
    assert smol_tokenizer.convert_ids_to_tokens(stop_ids) == ["<|im_end|>", "<|endoftext|>"]
    assert [decode_labels(smol_tokenizer, labels) for _, labels in rows] == ["a1<|im_end|>a2<|im_end|>"]
    assert_prompts_agree(smol_tokenizer, TWO_TURNS, stop_ids, rows)


def test_glm_like_template_stops_at_the_next_roles_token(smol_tokenizer):
    smol_tokenizer.chat_template = GLM_LIKE
    stop_ids, rows = encode_chat(smol_tokenizer, TWO_TURNS)
    assert smol_tokenizer.convert_ids_to_tokens(stop_ids)[0] == "<reponame>"
    assert [decode_labels(smol_tokenizer, labels) for _, labels in rows] == ["a1<reponame>a2<reponame>"]
    assert (
        smol_tokenizer.decode(rows[0][0])
        == "<reponame>\nq1<filename>\na1<reponame>\nq2<filename>\na2<reponame>"
    )
    assert_prompts_agree(smol_tokenizer, TWO_TURNS, stop_ids, rows)


def test_gemma_like_template_gets_the_system_message_in_the_first_question(smol_tokenizer, capsys):
    smol_tokenizer.chat_template = GEMMA_LIKE
    messages = [{"role": "system", "content": "Be brief."}, *TWO_TURNS]
    stop_ids, rows = encode_chat(smol_tokenizer, messages)
    text = smol_tokenizer.decode(rows[0][0])
    assert text.startswith("<|im_start|><start_of_turn>user\nBe brief.\n\nq1<|im_end|>")
    assert rows[0][0].count(smol_tokenizer.bos_token_id) == 1
    assert [decode_labels(smol_tokenizer, labels) for _, labels in rows] == ["a1<|im_end|>a2<|im_end|>"]
    assert_prompts_agree(smol_tokenizer, messages, stop_ids, rows)


def test_template_without_any_stop_token_gets_eos_appended(smol_tokenizer):
    smol_tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    _, rows = encode_chat(smol_tokenizer, TWO_TURNS[:2])
    assert decode_labels(smol_tokenizer, rows[0][1]) == " a1\n<|im_end|>"


def test_leading_assistant_turn_is_not_trained(smol_tokenizer):
    messages = [{"role": "assistant", "content": "Welcome!"}, *TWO_TURNS[:2]]
    _, rows = encode_chat(smol_tokenizer, messages)
    assert [decode_labels(smol_tokenizer, labels) for _, labels in rows] == ["a1<|im_end|>"]
    assert "Welcome!" in smol_tokenizer.decode(rows[0][0])


def test_chat_without_an_answer_gives_no_row(smol_tokenizer):
    assert encode_chat(smol_tokenizer, TWO_TURNS[:1])[1] == []


def test_train_on_source_labels_every_token(smol_tokenizer):
    stops = smol_tokenizer.convert_ids_to_tokens(find_stop_tokens(smol_tokenizer, []))
    (rendered,) = split_chat(smol_tokenizer, Chat(TWO_TURNS), stops)
    row = encode_row(smol_tokenizer, rendered, train_on_source=True)
    assert row["labels"] == row["input_ids"]


def test_chinese_answer_survives_tokenizing(smol_tokenizer):
    answer = "我是 Guanaco，由 Chinese-Guanaco 项目微调的语言模型。"
    _, rows = encode_chat(smol_tokenizer, [TWO_TURNS[0], {"role": "assistant", "content": answer}])
    assert decode_labels(smol_tokenizer, rows[0][1]) == answer + "<|im_end|>"


@pytest.fixture
def llama_tokenizer(tmp_path):
    """A tokenizer built as LLaMA's: SentencePiece BPE with a dummy prefix, byte fallback, bos 1, eos 2."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    corpus = [
        "Human: hello there\nAssistant: hello again, I am here",
        "### Response: fine",
        "答案是四。你好",
    ] * 9
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")  # no piece reaches over a blank
    tokenizer.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=480, special_tokens=special[:3]))
    tokenizer.pre_tokenizer = None
    vocabulary = {
        token: i for i, token in enumerate([*special, *(set(tokenizer.get_vocab()) - set(special))])
    }
    merges = [
        tuple(pair) if isinstance(pair, list) else tuple(pair.split(" ", 1)) for pair in _merges(tokenizer)
    ]
    merges = [pair for pair in merges if "\n" not in "".join(pair)]
    tokenizer.model = models.BPE(vocabulary, merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>")
    from tokenizers.processors import TemplateProcessing

    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )


def _merges(tokenizer):
    import json

    return json.loads(tokenizer.to_str())["model"]["merges"]


@pytest.mark.parametrize("name", sorted(set(GOLDEN) - {"vanilla", "chatml"}))
def test_sentencepiece_answers_are_tokenized_as_running_text_with_one_bos(llama_tokenizer, name):
    llama_tokenizer.chat_template = read_template(name)
    messages = [{**message, "content": "hello"} for message in TWO_TURNS]
    stop_ids, rows = encode_chat(llama_tokenizer, messages)
    ids, labels = rows[0]
    assert ids[0] == 1 and ids.count(1) == 1
    assert (
        ids[1:] == llama_tokenizer(render_chat(llama_tokenizer, messages), add_special_tokens=False).input_ids
    )
    answers = llama_tokenizer.convert_ids_to_tokens([label for label in labels if label != IGNORE_INDEX])
    hello = "hello" if name == "ziya" else "▁hello"  # ziya's answers follow the colon without a blank
    assert "".join(answers) == f"{hello}</s>" * 2
    assert_prompts_agree(llama_tokenizer, messages, stop_ids, rows)


def test_unknown_template_is_refused():
    with pytest.raises(UserError, match="--template alpacca: no such template"):
        read_template("alpacca")
