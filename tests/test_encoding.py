"""Token ids of training, of chat and of a server that tokenizes the whole rendered chat: the same, everywhere."""

import json

import pytest
import torch
from helpers import slow_but
from helpers.chats import build_chat_tokenizer, encode_prompt, encode_row
from helpers.families import FAMILIES, train_sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from utils.arguments import DataArguments, ModelArguments
from utils.data.rows import load_rows
from utils.data.tokenizing import TOKEN_SPLIT, tokenize_rows
from utils.models.encoding import encode_rows
from utils.models.tokenizer import load_chat_tokenizer
from utils.prompts.answer_spans import find_stop_tokens, read_template, split_chat, template_names
from utils.prompts.messages import IGNORE_INDEX, TRAIN, Chat

TURNS = [
    "Name the sky's colour.",
    "The sky is blue.",
    "你是谁？",
    "答案是四。我是 Guanaco。",
    "And 2 + 2?",
    "4, of course.",
]
CHAT = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(TURNS)]


def read_by_a_server(tokenizer, messages):
    """Ids as transformers' own apply_chat_template gives them: of the whole rendered chat."""
    return tokenizer.apply_chat_template(messages, return_dict=False)


def rows_of(tokenizer, messages):
    rendered = split_chat(tokenizer.raw, Chat(messages), tokenizer.stops)
    return rendered, [encode_row(tokenizer.raw, row) for row in rendered]


def check_prompts(tokenizer, rows, messages, server):
    """Before each answer a chat sends what a row has up to its label, and what the server reads there."""
    for turn in range(1, len(messages), 2):
        prompt = tokenizer.encode_prompt(messages[:turn])
        found = [row for row in rows if row["input_ids"][: len(prompt)] == prompt]
        assert any(row["labels"][len(prompt)] != IGNORE_INDEX for row in found), messages[turn]
        assert all(row["labels"][len(prompt) - 1] == IGNORE_INDEX for row in found), messages[turn]
        if server is not None:
            assert server[: len(prompt)] == prompt, messages[turn]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.id)
def test_training_chat_and_server_ids_are_the_same(family, families, tmp_path):
    from transformers import AutoTokenizer

    model_args = ModelArguments(str(families(family)))
    for template in (None, *template_names()):
        if template == "chatml" and family.id not in ("qwen2", "qwen3", "yi"):
            continue  # it needs <|im_end|>
        loaded = load_chat_tokenizer(model_args, DataArguments(template=template))
        tokenizer = loaded.raw
        rendered, rows = rows_of(loaded, CHAT)
        server = read_by_a_server(tokenizer, CHAT)
        if template in (None, "alpaca"):  # from its saved files, as a server finds them
            tokenizer.save_pretrained(tmp_path)
            assert read_by_a_server(AutoTokenizer.from_pretrained(tmp_path), CHAT) == server
        if len(rows) > 1:  # earlier answers are rewritten, so an earlier turn is a chat of its own
            for end, row in zip((2, 4, 6), rows, strict=True):
                trained = row["input_ids"]
                assert trained == read_by_a_server(tokenizer, CHAT[:end])[: len(trained)], template
            check_prompts(loaded, rows, CHAT, None)
            continue
        trained = rows[0]["input_ids"]
        end = len(trained) - (not server_text_has(tokenizer, rendered[0]))  # an appended stop token is ours
        if template != "vanilla":  # "4" may merge with "2?": there a token is split, which is counted
            assert trained[:end] == server[:end], template
        check_prompts(loaded, rows, CHAT, server)


def server_text_has(tokenizer, row):
    return tokenizer.apply_chat_template(row.messages, tokenize=False).startswith(row.text)


def byte_level_tokenizer(*lines, merges_all=False):
    """Byte-level BPE that has learned to merge what stands in `lines`; `merges_all`: across words as well."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not merges_all)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    backend.train_from_iterator(lines, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")


def sentencepiece_tokenizer(folder, legacy_class=False):
    """LLaMA's kind: a dummy prefix and byte fallback; `legacy_class`: the slow one, without offsets."""
    from utils.models.tokenizer_files import load_own_tokenizer

    (folder / "tokenizer.model").write_bytes(train_sentencepiece())
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    if legacy_class:
        from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

        return SentencePieceBackend(vocab_file=str(folder / "tokenizer.model"), **names)
    (folder / "tokenizer_config.json").write_text(json.dumps(names | {"tokenizer_class": "LlamaTokenizer"}))
    return load_own_tokenizer(str(folder), False)


CHATML = (
    "{% for m in messages %}{{ m.role }}\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant\n{% endif %}"
)


def answer_chat(tokenizer, template, question, answer):
    """(ids of the prompt that a chat sends, the training row, how many tokens were split)."""
    tokenizer.chat_template = template
    asked = [{"role": "user", "content": question}]
    stop_ids = find_stop_tokens(tokenizer, [])
    rendered = split_chat(
        tokenizer, Chat([*asked, {"role": "assistant", "content": answer}]), [tokenizer.eos_token]
    )
    ((_, splits),) = encode_rows(tokenizer, rendered)
    return encode_prompt(tokenizer, asked, stop_ids), encode_row(tokenizer, rendered[0]), splits


@pytest.mark.parametrize(
    ("template", "question", "answer", "merged"),
    [
        (CHATML, "q", "\nfirst line", ["\n\n"] * 9),  # a newline of the prompt with one of the answer
        (read_template("vanilla"), "你", "好", ["你好"] * 9),  # bytes of two characters
        (read_template("vanilla"), "hel", "lo", ["hello hello"] * 9),
    ],
)
def test_token_that_would_reach_into_the_answer_is_split_and_counted(template, question, answer, merged):
    tokenizer = byte_level_tokenizer(*merged, merges_all=True)
    prompt, row, splits = answer_chat(tokenizer, template, question, answer)
    text = tokenizer.decode(row["input_ids"])
    whole = tokenizer(text, add_special_tokens=False).input_ids
    assert splits == 1 and row["input_ids"] != whole  # tokenized as one, a token would lie across the border
    assert row["input_ids"][: len(prompt)] == prompt
    assert row["labels"][: len(prompt)] == [IGNORE_INDEX] * len(prompt)
    assert row["labels"][len(prompt) :] == row["input_ids"][len(prompt) :]
    assert tokenizer.decode(row["labels"][len(prompt) :]) == answer + "</s>"


def test_blanks_that_end_a_prompt_are_the_tokens_that_a_chat_sends(smol_tokenizer):
    """To GPT-2's rule two newlines are one token at the end of a text, and two before a word."""
    ids = [smol_tokenizer(text, add_special_tokens=False).input_ids for text in ("q\n\n", "q\n\nYes")]
    assert ids[1][: len(ids[0])] != ids[0]
    template = (
        "{{ messages[0].content }}\n\n{% if messages[1] %}{{ messages[1].content + eos_token }}{% endif %}"
    )
    prompt, row, splits = answer_chat(smol_tokenizer, template, "q", "Yes")
    assert row["input_ids"][: len(prompt)] == prompt == ids[0] and splits == 1
    assert smol_tokenizer.decode(row["labels"][len(prompt) :]) == "Yes<|im_end|>"


def test_rows_with_a_split_token_are_counted_in_the_report(tmp_path, monkeypatch):
    from utils.arguments import TrainingArguments

    monkeypatch.setenv("QLORA_CACHE", str(tmp_path / "cache"))
    tokenizer = byte_level_tokenizer(*["\n\n"] * 9, merges_all=True)
    tokenizer.chat_template = CHATML
    path = tmp_path / "rows.json"
    answers = ["plain", "\nnewline first", "plain again"]
    path.write_text(
        json.dumps([{"instruction": f"q{i}", "output": answer} for i, answer in enumerate(answers)])
    )
    data_args = DataArguments(str(path))
    rows = load_rows(ModelArguments(), data_args, TrainingArguments())
    found = tokenize_rows(rows, build_chat_tokenizer(tokenizer), data_args)[TRAIN].found
    assert found["counts"][TOKEN_SPLIT] == 1 and found["rows"][TOKEN_SPLIT] == [2]


@pytest.mark.parametrize("slow", [False, True])
def test_split_token_leaves_no_dummy_prefix_behind(tmp_path, slow):
    tokenizer = sentencepiece_tokenizer(tmp_path, slow)
    assert tokenizer.is_fast != slow
    prompt, row, splits = answer_chat(tokenizer, read_template("vanilla"), "I am Guan", "aco")
    answer = [label for label in row["labels"] if label != IGNORE_INDEX]
    assert splits == 1
    assert "".join(tokenizer.convert_ids_to_tokens(answer)) == "aco</s>"  # "▁aco" would be a blank more
    assert row["input_ids"][: len(prompt)] == prompt


@pytest.mark.parametrize("name", sorted(set(template_names()) - {"vanilla", "chatml"}))
def test_slow_tokenizer_gives_the_ids_of_the_whole_text(tmp_path, name):
    tokenizer = sentencepiece_tokenizer(tmp_path, True)
    prompt, row, splits = answer_chat(tokenizer, read_template(name), "Who are you?", "我是 Guanaco.")
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "我是 Guanaco."}],
        tokenize=False,
    )
    assert splits == 0 and row["input_ids"] == tokenizer(text, add_special_tokens=False).input_ids
    assert row["input_ids"][: len(prompt)] == prompt and row["labels"][len(prompt)] != IGNORE_INDEX


SHAPES = st.text(st.sampled_from(" \n\tabhelo.,你好🙂é\u3000"), min_size=1, max_size=12)


@settings(max_examples=150, deadline=None)
@given(question=SHAPES, answer=SHAPES, other=SHAPES, suffix=st.sampled_from([": ", ":", "\n", ":  ", " "]))
def test_the_prompt_of_a_chat_never_depends_on_the_answer(question, answer, other, suffix):
    tokenizer = GREEDY
    template = "{{ messages[0].content + SUFFIX }}{% if messages[1] %}{{ messages[1].content + eos_token }}{% endif %}"
    template = template.replace("SUFFIX", json.dumps(suffix))
    for reply in (answer, other):
        prompt, row, _ = answer_chat(tokenizer, template, question, reply)
        assert row["input_ids"][: len(prompt)] == prompt
        assert row["labels"] == [IGNORE_INDEX] * len(prompt) + row["input_ids"][len(prompt) :]
        assert tokenizer.decode(row["input_ids"]) == question + suffix + reply + "</s>"


GREEDY = byte_level_tokenizer("hello: 你好\n\nab 🙂  a: b: \n a", "::  \n\n", merges_all=True)


# Questions with short answers, of the kind that a chat is asked. Written for this test.
SHORT_ANSWERS = [
    ("What is the capital of France?", "The capital of France is Paris."),
    ("Name the three primary colors.", "The three primary colors are red, yellow, and blue."),
    ("How many days are in a week?", "There are seven days in a week."),
    ("What is the opposite of hot?", "The opposite of hot is cold."),
    ("Who wrote Romeo and Juliet?", "Romeo and Juliet was written by William Shakespeare."),
    ("What is the largest planet?", "The largest planet in the solar system is Jupiter."),
    ("At what temperature does water boil?", "Water boils at 100 degrees Celsius."),
    ("What is 2 + 2?", "2 + 2 is 4."),
]


@torch.no_grad()
def measure_nats(model, pairs):
    """Nats of the answers, summed; `pairs` of token ids (prompt, answer)."""
    width = max(len(prompt) + len(answer) for prompt, answer in pairs)
    ids = torch.tensor(
        [prompt + answer + [0] * (width - len(prompt) - len(answer)) for prompt, answer in pairs]
    )
    mask = torch.tensor([[i < len(prompt) + len(answer) for i in range(width)] for prompt, answer in pairs])
    found = model(ids, attention_mask=mask.long()).logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])
    return -sum(
        found[i, len(prompt) - 1 : len(prompt) + len(answer) - 1].sum().item()
        for i, (prompt, answer) in enumerate(pairs)
    )


@pytest.fixture(scope="module")
def smol_model(smollm2):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()


BARS = {"alpaca": 0.41, "vicuna": 0.29, "guanaco": 0.36}


@pytest.mark.parametrize("name", slow_but(["alpaca"], BARS))
def test_base_finds_answers_where_it_has_seen_them(smol_tokenizer, smol_model, name):
    together, apart = [], []
    for question, answer in SHORT_ANSWERS:
        _, row, _ = answer_chat(smol_tokenizer, read_template(name), question, answer)
        border = row["labels"].count(IGNORE_INDEX)
        assert row["input_ids"][-1] == smol_tokenizer.eos_token_id
        together.append((row["input_ids"][:border], row["input_ids"][border:-1]))
        prompt = smol_tokenizer.decode(row["input_ids"][:border]) + " "
        apart.append((smol_tokenizer(prompt).input_ids, smol_tokenizer(answer).input_ids))
    characters = sum(len(answer) for _, answer in SHORT_ANSWERS)
    nats, before = (measure_nats(smol_model, pairs) / characters for pairs in (together, apart))
    print(f"{name}: {nats:.3f} nats a character, tokenized apart {before:.3f}")
    assert nats <= BARS[name] and nats < 0.9 * before
