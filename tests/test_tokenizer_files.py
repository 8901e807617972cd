"""Old LLaMA tokenizers with wrong special ids are corrected and reported; right ones are left alone.

And what a tokenizer leaves open is decided the same way at every start: its template, its pad token.
"""

import json

import pytest
from helpers.families import build_decapoda, build_llama1, build_llama2, build_phi3, build_qwen2, build_yi

from utils.arguments import DataArguments, ModelArguments
from utils.console import UserError
from utils.models.tokenizer import load_chat_tokenizer, load_tokenizer
from utils.models.tokenizer_files import load_own_tokenizer
from utils.prompts.answer_spans import find_input_marker, read_template
from utils.prompts.rendering import render_chat
from utils.run.record import hash_text

CORRECTED = "special tokens are wrong (an old LLaMA conversion): corrected to bos 1, eos 2\n"


def change_settings(folder, **settings):
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def load(folder):
    return load_own_tokenizer(str(folder), trust_remote_code=False)


def assert_llama_specials(tokenizer):
    assert (tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert tokenizer("a").input_ids[0] == 1 and tokenizer("a</s>").input_ids[-1] == 2


def test_decapoda_conversion_is_corrected_in_one_line(tmp_path, capsys):
    build_decapoda(tmp_path)
    capsys.readouterr()
    assert_llama_specials(load(tmp_path))
    assert capsys.readouterr().out == f"the tokenizer's {CORRECTED}"


@pytest.mark.parametrize(
    "wrong",
    [
        {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>"},  # Stanford Alpaca's
        {"bos_token": "<unk>", "eos_token": "<s>", "unk_token": ""},
        {"bos_token": "", "eos_token": "", "unk_token": ""},
    ],
)
@pytest.mark.parametrize("build", [build_llama1, build_llama2])
def test_wrong_special_tokens_are_corrected(build, wrong, tmp_path, capsys):
    build(tmp_path)
    change_settings(tmp_path, **wrong)
    capsys.readouterr()
    assert_llama_specials(load(tmp_path))
    assert CORRECTED in capsys.readouterr().out


@pytest.mark.parametrize("build", [build_llama1, build_llama2, build_phi3, build_yi])
def test_right_special_tokens_are_left_alone_and_nothing_is_said(build, tmp_path, capsys):
    build(tmp_path)
    capsys.readouterr()
    tokenizer = load(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert (tokenizer.bos_token, tokenizer.eos_token) == (settings["bos_token"], settings["eos_token"])
    assert capsys.readouterr().out == ""


def test_corrected_tokenizer_stops_at_eos_and_never_at_bos(tmp_path):
    """The conversion's generation_config names 1, the BOS, as its end."""
    build_decapoda(tmp_path)
    model_args = ModelArguments(model_name_or_path=str(tmp_path))
    assert load_chat_tokenizer(model_args, DataArguments()).stop_ids == [2]


def test_correction_is_saved_with_the_run(tmp_path, capsys):
    build_decapoda(tmp_path)
    load(tmp_path).save_pretrained(tmp_path / "run")
    capsys.readouterr()
    assert_llama_specials(load(tmp_path / "run"))
    assert capsys.readouterr().out == ""


def test_tokens_added_beside_a_sentencepiece_file_are_kept(tmp_path):
    """A 2023 fine-tune: tokenizer.model and added_tokens.json."""
    build_llama1(tmp_path)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|im_end|>": 700, "<|im_start|>": 701}))
    tokenizer = load(tmp_path)
    assert tokenizer("<|im_end|>", add_special_tokens=False).input_ids == [700]


def test_template_beside_a_sentencepiece_file_is_kept(tmp_path):
    build_llama1(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}!")
    assert load(tmp_path).chat_template == "{{ messages[0].content }}!"


def test_blank_that_only_tokenizer_json_adds_is_dropped(tmp_path):
    """Yi-1.5: its tokenizer.json was converted with a dummy prefix, its sentencepiece file has none."""
    import sentencepiece

    build_yi(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["normalizer"]["normalizers"].insert(0, {"type": "Prepend", "prepend": "▁"})
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = load(tmp_path)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    for text in ("<|im_end|>\n", "<|im_start|>user\nWho are you? 你是谁？<|im_end|>"):
        assert tokenizer(text, add_special_tokens=False).input_ids == reference.encode(text)
        assert tokenizer.decode(reference.encode(text)) == text


TEMPLATES = {
    "default": "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}",
    "rag": "rag: {{ messages[0].content }}",
    "tool_use": "tools: {{ messages[0].content }}",
}


def keep_templates(folder, templates, place):
    """Named templates as tokenizer_config.json held them, or as files, as transformers writes them now."""
    if place == "config":
        named = [{"name": name, "template": template} for name, template in templates.items()]
        change_settings(folder, chat_template=named)
        return
    change_settings(folder, chat_template=None)
    (folder / "additional_chat_templates").mkdir()
    for name, template in templates.items():
        path = folder / "additional_chat_templates" / f"{name}.jinja"
        (folder / "chat_template.jinja" if name == "default" else path).write_text(template)


@pytest.mark.parametrize("place", ["config", "files"])
@pytest.mark.parametrize("build", [build_llama2, build_qwen2, build_llama1])
def test_of_named_templates_the_default_is_used_and_saved(build, place, tmp_path, capsys):
    """llama1 has a sentencepiece file alone. transformers itself chooses default for plain messages."""
    from transformers import AutoTokenizer

    build(tmp_path)
    keep_templates(tmp_path, TEMPLATES, place)
    tokenizer = load_tokenizer(ModelArguments(model_name_or_path=str(tmp_path)))
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    expected = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(chat, tokenize=False)
    # LLaMA's tokenizer puts a BOS before any text: so does its template, here and in the run.
    adds_bos = build is not build_qwen2
    assert expected == "<user>q</s><assistant>a</s>"
    assert render_chat(tokenizer, chat) == "<s>" * adds_bos + expected
    assert len(hash_text(tokenizer.chat_template)) == 64 and find_input_marker(tokenizer) == "\n\n"
    tokenizer.save_pretrained(tmp_path / "run")
    saved = (tmp_path / "run" / "chat_template.jinja").read_text()
    assert saved == "{{ bos_token }}" * adds_bos + TEMPLATES["default"]
    assert not (tmp_path / "run" / "additional_chat_templates").exists()
    capsys.readouterr()
    again = load_tokenizer(ModelArguments(str(tmp_path), checkpoint_dir=str(tmp_path / "run")))
    assert render_chat(again, chat) == render_chat(tokenizer, chat) and capsys.readouterr().out == ""


def test_named_templates_without_a_default_are_one_line_and_a_flag_overrides(tmp_path):
    build_qwen2(tmp_path)
    keep_templates(tmp_path, {name: TEMPLATES[name] for name in ("tool_use", "rag")}, "config")
    model_args = ModelArguments(model_name_or_path=str(tmp_path))
    with pytest.raises(
        UserError, match=r"named rag, tool_use and none named default: .*--template \(alpaca,"
    ):
        load_tokenizer(model_args)
    tokenizer = load_tokenizer(model_args, "vanilla")
    assert tokenizer.chat_template == read_template("vanilla")
    keep_templates(tmp_path, TEMPLATES, "config")
    assert load_tokenizer(model_args, "alpaca").chat_template == read_template("alpaca")


def test_pad_token_is_the_same_at_every_start(tmp_path):
    """The vocabulary comes in another order each time: of the reserved pad tokens the one with the smallest id."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    names = ["a", "</s>", "padding", *(f"<|pad_{i}|>" for i in (7, 3, 12, 0, 9, 1, 30, 2)), "<pad>"]
    backend = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>").save_pretrained(tmp_path)
    pads = {load_tokenizer(ModelArguments(str(tmp_path)), "vanilla").pad_token for _ in range(12)}
    assert pads == {"<|pad_7|>"} and names.index("<|pad_7|>") == 3
