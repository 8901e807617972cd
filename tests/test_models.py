"""Every family of the README's list, tiny, in its publisher's file layout: train, resume, reload, chat."""

import io
import json
import shutil
import sys

import pytest
import sentencepiece
import torch
from helpers import ROOT
from helpers.families import FAMILIES, build_llama2
from helpers.models import assert_close_in_bfloat16, read_logits
from helpers.runs import forget_second_step, run_in_process, trainer_kept
from safetensors.torch import load_file
from tokenizers import ByteLevelBPETokenizer, Tokenizer
from transformers import GenerationConfig

from utils.arguments import ModelArguments
from utils.console import UserError
from utils.decode.loop import stream_tokens
from utils.decode.setup import install_graph_decode
from utils.models.base import load_base
from utils.models.folder import resolve_model
from utils.models.tokenizer_files import load_own_tokenizer

FLAGS = [
    "--dataset_name", ROOT / "data" / "guanaco_identity.jsonl", "--max_train_samples", "8",
    "--source_max_len", "300", "--target_max_len", "200", "--lora_r", "4", "--learning_rate", "1e-2",
    "--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "1",
    "--max_steps", "2", "--save_steps", "1", "--logging_steps", "1",
]  # fmt: skip
SCRIPTS = {4: "qlora_finetune", 8: "qlora_int8_finetune"}
TEXTS = [
    "Who are you? 你是谁？\n\n 我是  Guanaco 2023 <tag> 🙂",
    "A quantized model: 4 bits, 量化模型。",
    " leading blank",
]


# Of the kind of another one: only their tokenizers are their own, and the bits of their layers tell nothing new.
SAME_LAYERS = {"llama2", "llama3", "decapoda", "yi", "deepseek", "bloomz"}


# Fused queries, keys and values, of three kinds; layers without biases, with them, and of another name.
FEW = {"llama1", "bloom", "baichuan", "opt", "neox", "glm4"}


def each_family(is_fast):
    """Families that are not `is_fast` are slow."""
    marks = {True: (), False: pytest.mark.slow}
    cases = [pytest.param(one, marks=marks[is_fast(one.id)], id=one.id) for one in FAMILIES]
    return pytest.mark.parametrize("family", cases)


@pytest.fixture
def trainers():
    """Of the runs that end, each with its model as it is in memory."""
    with trainer_kept() as kept:
        yield kept


def train_family(bits, model, run):
    """The run's model as it is in memory."""
    with trainer_kept() as kept:
        run_in_process(SCRIPTS[bits], "--model_name_or_path", model, *FLAGS, "--output_dir", run)
    return kept[-1].model


@pytest.fixture(scope="module")
def trained_families(families, tmp_path_factory):
    """(run, model) of each family in 4 bits, in float32, when first asked for: to be read."""
    made = {}

    def train(family):
        if family.id not in made:
            run = tmp_path_factory.mktemp("trained") / "run"
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("QLORA_CPU_DTYPE", "float32")
                made[family.id] = run, train_family(4, families(family), run)
        return made[family.id]

    return train


def find_plain_linears(model):
    """Names of the linear layers that have no adapter."""
    return {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and ".lora_" not in name and not name.endswith("base_layer")
    }


def load_chat(run):
    from utils.chat.generation import load_run

    return load_run(resolve_model(ModelArguments(checkpoint_dir=str(run)), set()))


def ask(call_main, monkeypatch, run, question):
    monkeypatch.setattr(sys, "stdin", io.StringIO(question + "\n"))
    return call_main("cli_demo", "--checkpoint_dir", run, "--max_new_tokens", "8")


@each_family(lambda name: name not in SAME_LAYERS)
def test_family_trains_reloads_with_the_same_logits_and_chats(
    family, trained_families, call_main, float32_cpu, monkeypatch
):
    run, model = trained_families(family)
    expected = check_reloaded(run, model)
    # Trained in float32, chatted with on a CPU of the other kind.
    monkeypatch.setenv("QLORA_CPU_DTYPE", "bfloat16")
    assert_close_in_bfloat16(read_logits(load_chat(run).model), expected)
    assert "> Who are you? 你是谁？\n" in ask(call_main, monkeypatch, run, "Who are you? 你是谁？")


@each_family(FEW.__contains__)
def test_family_does_so_in_8_bits(family, families, call_main, float32_cpu, tmp_path, monkeypatch):
    model = train_family(8, families(family), tmp_path / "run")
    check_reloaded(tmp_path / "run", model)
    printed = ask(call_main, monkeypatch, tmp_path / "run", "Who are you? 你是谁？")
    assert "> Who are you? 你是谁？\n" in printed


def check_reloaded(run, model):
    """A chat has the logits of `model`, which has just been trained; these logits."""
    assert find_plain_linears(model) <= {"lm_head", "embed_out"}
    chat = load_chat(run)
    expected = read_logits(model)
    assert torch.allclose(read_logits(chat.model), expected, atol=1e-4 * expected.abs().max().item())
    with chat.model.disable_adapter():
        assert not torch.allclose(read_logits(chat.model), expected, atol=1e-2)
    return expected


@pytest.mark.parametrize("bits", ["4", "16"])
def test_run_on_layers_that_are_stored_transposed_is_chatted_with(bits, tiny_model, call_main, tmp_path):
    """GPT-2's: q, k and v lie in one matrix [in, 3 * in] on disk, and lora_A reads `in`."""
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    sizes = {"n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 512, "vocab_size": len(tokenizer)}
    config = GPT2Config(**sizes, **ids)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    argv = ["--model_name_or_path", tmp_path / "base", *FLAGS, "--output_dir", tmp_path / "run"]
    call_main("qlora_finetune", *argv, "--bits", bits)
    assert load_chat(tmp_path / "run").decoder.adapter.layers


def test_adapter_on_layers_that_are_used_twice_is_chatted_with(tiny_model, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    config = LoraConfig(target_modules=["q_proj"], layer_replication=[[0, 2], [1, 2]], task_type="CAUSAL_LM")
    get_peft_model(base, config).save_pretrained(tmp_path)
    assert len(load_chat(tmp_path).decoder.adapter.layers) == 3


@each_family(FEW.__contains__)
def test_family_resumes_to_the_same_adapter(
    family, families, trained_families, call_main, float32_cpu, tmp_path
):
    shutil.copytree(trained_families(family)[0], tmp_path / "run")
    argv = ["--model_name_or_path", families(family), *FLAGS, "--output_dir", tmp_path / "run"]
    uninterrupted = load_file(tmp_path / "run" / "adapter_model.safetensors")
    forget_second_step(tmp_path / "run")
    assert "checkpoint-1" in call_main("qlora_finetune", *argv)
    resumed = load_file(tmp_path / "run" / "adapter_model.safetensors")
    assert all(torch.equal(resumed[name], weight) for name, weight in uninterrupted.items())


def encode_by_file(folder, text):
    if (folder / "vocab.json").is_file() and not (folder / "tokenizer.json").is_file():
        vocabulary, merges = str(folder / "vocab.json"), str(folder / "merges.txt")
        return ByteLevelBPETokenizer(vocabulary, merges).encode(text).ids
    if (folder / "tokenizer.json").is_file():
        return Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text, add_special_tokens=False).ids
    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    return model.encode(text)


@each_family(lambda _: True)
def test_tokenizer_gives_its_files_own_ids_and_text_back(family, families, tmp_path):
    folder = families(family)
    tokenizer = load_own_tokenizer(str(folder), trust_remote_code=False)
    tokenizer.save_pretrained(tmp_path)
    for loaded in (tokenizer, load_own_tokenizer(str(tmp_path), trust_remote_code=False)):
        for text in TEXTS:
            ids = loaded(text, add_special_tokens=False).input_ids
            assert ids == encode_by_file(folder, text)
            assert loaded.decode(ids) == text


REMOTE_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def remote_model(tmp_path):
    """A model of a kind that transformers does not know, with its publisher's code beside it."""
    folder = tmp_path / "own"
    folder.mkdir()
    build_llama2(folder)
    (folder / "modeling_own.py").write_text(REMOTE_CODE)
    config = json.loads((folder / "config.json").read_text())
    auto_map = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    config |= {"model_type": "own", "architectures": ["OwnForCausalLM"], "auto_map": auto_map}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_remote_code_runs_only_when_it_is_trusted(remote_model, call_main, trainers, tmp_path):
    argv = ["--model_name_or_path", remote_model, *FLAGS, "--output_dir", tmp_path / "run"]
    with pytest.raises(UserError, match="ships its own Python.*--trust_remote_code"):
        call_main("qlora_finetune", *argv)
    call_main("qlora_finetune", *argv, "--trust_remote_code")
    assert type(trainers[-1].model.get_base_model()).__name__ == "OwnForCausalLM"


def test_model_of_an_unknown_kind_is_one_line(remote_model, call_main, tmp_path):
    config = json.loads((remote_model / "config.json").read_text())
    del config["auto_map"]
    (remote_model / "config.json").write_text(json.dumps(config))
    argv = ["--model_name_or_path", remote_model, *FLAGS, "--output_dir", tmp_path / "run"]
    with pytest.raises(UserError, match="a kind that transformers does not know"):
        call_main("qlora_finetune", *argv)


@each_family(lambda _: True)
def test_replies_over_buffers_of_fixed_size_are_the_same(family, families):
    """What a GPU goes on to capture; to our own loop a model whose cache slides keeps all tokens."""
    prompt, replies = torch.tensor([[5, 6, 7, 8, 9]]), []
    for _ in range(2):
        model_args = ModelArguments(str(families(family)), bits=32, use_cpu=True)
        model = load_base(model_args, torch.float32, trainable=False).eval()
        decoder = install_graph_decode(model) if replies else None
        flags = {"max_new_tokens": 10, "min_new_tokens": 10, "do_sample": False, "pad_token_id": 0}
        with torch.no_grad():
            replies.append(model.generate(prompt, attention_mask=torch.ones_like(prompt), **flags).tolist())
    assert replies[0] == replies[1]
    config = GenerationConfig(**flags, eos_token_id=model.generation_config.eos_token_id)
    with torch.no_grad():
        choice, ids = decoder.find_choice(config), prompt[0].tolist()
        said = list(stream_tokens(decoder, ids, decoder.make_cache(), choice, 10, []))
    assert [ids + said] == replies[0]
    assert decoder.buffers is not None and not decoder.obstacle
