"""Old LLaMA tokenizers with wrong special ids are corrected and reported; right ones are left alone."""

import json

import pytest
from tiny_models import build_decapoda, build_llama1, build_llama2, build_phi3, build_yi

from utils.arguments import ModelArguments
from utils.tokenizer_files import load_own_tokenizer

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
    from utils.model import load_stop_ids, load_tokenizer

    build_decapoda(tmp_path)
    model_args = ModelArguments(model_name_or_path=str(tmp_path))
    tokenizer = load_tokenizer(model_args)
    assert load_stop_ids(model_args, tokenizer) == [2]


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
