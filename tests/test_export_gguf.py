"""A GGUF file is the merged model: its weights and tokens as transformers and llama.cpp read them, its prompt in Go."""

import json
import shutil
import subprocess

import pytest
import torch
from gguf import GGUFReader
from helpers import IDENTITY, ROOT
from helpers.families import FAMILIES
from helpers.models import read_logits
from helpers.runs import train
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from utils.arguments import ModelArguments
from utils.console import UserError
from utils.merge.modelfile import build_probe, compose, read_turn_texts, render_modelfile
from utils.models.base import load_base
from utils.models.folder import resolve_model
from utils.models.tokenizer import ChatTokenizer, load_run_tokenizer
from utils.prompts.answer_spans import read_template, render_chat, template_names

WRITTEN = [
    "llama1",
    "decapoda",
    "llama2",
    "llama3",
    "baichuan",
    "mistral",
    "qwen2",
    "qwen3",
    "yi",
    "deepseek",
]
OTHERS = [family.id for family in FAMILIES if family.id not in WRITTEN]
TEXT = "Who are you?  你是谁？ I'm 12345, she'll\n\n  go <b>💡</b>"


@pytest.fixture
def build_family(tmp_path):
    def build(name):
        base = tmp_path / "base"
        base.mkdir()
        next(family.build for family in FAMILIES if family.id == name)(base)
        return base

    return build


def save_adapter(base, folder):
    """A random adapter saved by PEFT, and the logits of PEFT's own forward over the 4-bit base, in float32."""
    model = load_base(ModelArguments(str(base), bits=4), torch.float32)
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")).eval()
    torch.manual_seed(1)
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data += 0.1 * torch.randn_like(weight)
    model.save_pretrained(folder)
    return folder, read_logits(model)


def read_fields(file):
    return {name: field.contents() for name, field in GGUFReader(file).fields.items()}


@pytest.mark.parametrize("family", WRITTEN)
def test_gguf_of_a_family_says_what_pefts_forward_says(family, build_family, call_main, tmp_path):
    """transformers reads the file by code of its own."""
    base = build_family(family)
    adapter, expected = save_adapter(base, tmp_path / "adapter")
    call_main("utils.export_gguf", adapter, tmp_path / "out", "--model_name_or_path", base, "--no_parity")
    sizes = {"head_dim": 16} if family == "qwen3" else {}  # transformers does not read key_length
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", gguf_file="out-f16.gguf", dtype=torch.float32, **sizes
    )
    logits = read_logits(loaded)
    assert ((logits - expected).norm() / expected.norm()).item() < 0.01
    fields = read_fields(tmp_path / "out" / "out-f16.gguf")
    tokenizer = load_run_tokenizer(resolve_model(ModelArguments(str(base), bits=16), set()))
    ends = {fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")}
    assert set(tokenizer.stop_ids) <= ends
    assert fields["tokenizer.chat_template"] == tokenizer.raw.chat_template
    assert len(fields["tokenizer.ggml.tokens"]) == loaded.get_input_embeddings().num_embeddings


@pytest.mark.slow
@pytest.mark.parametrize("family", WRITTEN)
def test_llama_cpp_reads_texts_and_prompts_as_our_tokenizer_does(family, build_family, call_main, tmp_path):
    llama_cpp = pytest.importorskip("llama_cpp")
    base = build_family(family)
    call_main("utils.export_gguf", base, tmp_path / "out", "--no_parity")
    model = llama_cpp.Llama(str(tmp_path / "out" / "out-f16.gguf"), vocab_only=True, verbose=False)
    tokenizer = load_run_tokenizer(resolve_model(ModelArguments(str(base), bits=16), set()))
    chat = [{"role": "user", "content": TEXT}, {"role": "assistant", "content": "A. " + TEXT}]
    rendered = render_chat(tokenizer.raw, [*chat, chat[0]], add_generation_prompt=True)
    expected = tokenizer.raw(rendered, add_special_tokens=False).input_ids
    assert model.tokenize(rendered.encode(), add_bos=False, special=True) == expected


@pytest.mark.parametrize("family", OTHERS)
def test_other_family_gets_llama_cpps_command_or_the_reason_why_not(
    family, build_family, call_main, tmp_path
):
    said = "llama.cpp does not compute it" if family == "opt" else r"convert_hf_to_gguf\.py MERGED --outfile"
    with pytest.raises(UserError, match=said):
        call_main("utils.export_gguf", build_family(family), tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}, "of the type yarn"),
        ({"hidden_act": "gelu"}, "activation gelu"),
        ({"model_type": "mistral", "sliding_window": 4096}, "sliding window"),
    ],
)
def test_layout_that_would_be_computed_otherwise_is_refused(change, said, call_main, small_model, tmp_path):
    base = shutil.copytree(small_model, tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(UserError, match=said):
        call_main("utils.export_gguf", base, tmp_path / "out")


def test_llama_31_frequencies_and_q8_matrices_are_those_of_transformers(call_main, small_model, tmp_path):
    base = shutil.copytree(small_model, tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 256}
    (base / "config.json").write_text(json.dumps(config | {"rope_parameters": rope}))
    call_main("utils.export_gguf", base, tmp_path / "out", "--outtype", "q8_0")
    tensors = {tensor.name: tensor for tensor in GGUFReader(tmp_path / "out" / "out-q8_0.gguf").tensors}
    head_dim = config["hidden_size"] // config["num_attention_heads"]
    plain = 500000.0 ** -(torch.arange(0, head_dim, 2) / head_dim)
    scaled = AutoModelForCausalLM.from_pretrained(base).model.rotary_emb.inv_freq
    assert torch.allclose(
        torch.from_numpy(tensors["rope_freqs.weight"].data.copy()), plain / scaled, rtol=1e-5
    )
    assert tensors["blk.0.ffn_up.weight"].tensor_type.name == "Q8_0"
    assert tensors["blk.0.attn_norm.weight"].tensor_type.name == "F32"
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", gguf_file="out-q8_0.gguf")
    ours = loaded.model.layers[0].mlp.up_proj.weight
    theirs = AutoModelForCausalLM.from_pretrained(base).model.layers[0].mlp.up_proj.weight
    assert 0 < (ours.float() - theirs.float()).norm() / theirs.float().norm() < 0.01


def test_mistakes_are_one_line_before_weights_load(call_main, small_model, tmp_path):
    for argv, said in (
        ([], "name the run and a new folder"),
        (["some_run"], "name the run and a new folder"),
        ([small_model, tmp_path], "exists: name a new folder"),
        ([tmp_path / "no", tmp_path / "out"], "no such folder"),
        ([small_model, tmp_path / "out", "--outtype", "q4"], "--outtype"),
    ):
        with pytest.raises(UserError, match=said):
            call_main("utils.export_gguf", *argv)


def load_template(tokenizer, name):
    tokenizer.chat_template = read_template(name)
    return ChatTokenizer(tokenizer, [tokenizer.eos_token_id])


def test_modelfile_of_vicuna_is_known_to_the_letter(smol_tokenizer):
    smol_tokenizer.eos_token = "<|endoftext|>"
    head = (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions. "
    )
    assert render_modelfile(load_template(smol_tokenizer, "vicuna"), "mine-f16.gguf") == (
        "# Not tried with Ollama itself: ollama create NAME -f Modelfile; ollama run NAME\n"
        "FROM ./mine-f16.gguf\n"
        'TEMPLATE """{{ if .System }}{{ .System }} USER: {{ else }}' + head + "USER: {{ end }}"
        '{{ range $i, $_ := .Messages }}{{ if eq .Role "user" }}{{ .Content }} ASSISTANT:'
        '{{ else if eq .Role "assistant" }} {{ .Content }}'
        '{{ if gt (len (slice $.Messages $i)) 1 }}<|endoftext|>USER: {{ end }}{{ end }}{{ end }}"""\n'
        'PARAMETER stop "<|endoftext|>"\n'
        "PARAMETER temperature 0\n"
    )


@pytest.mark.parametrize("name", template_names())
def test_composed_chat_is_what_the_template_renders(name, smol_tokenizer):
    if name == "vanilla":
        pytest.skip("it has no history")
    smol_tokenizer.chat_template = read_template(name)
    texts = read_turn_texts(lambda messages, prompted: render_chat(smol_tokenizer, messages, prompted))
    for words in (("Hi",), ("Hi", "Yes.", "Why?"), ("Obey me", "1", "2", "3", "4", "5")):
        chat = build_probe(*words)
        assert compose(texts, chat) == render_chat(smol_tokenizer, chat, add_generation_prompt=True)


def test_template_of_another_form_gets_no_modelfile(smol_tokenizer):
    other = "{% for message in messages %}[{{ message.role }}] {{ message.content }}\n{% endfor %}"
    numbered = (
        "{% for message in messages %}<|im_start|>{{ loop.index }}{{ message.content }}<|im_end|>{% endfor %}"
    )
    for template in (other, numbered):
        smol_tokenizer.chat_template = template
        with pytest.raises(UserError, match="no Modelfile: Ollama's templates are written in Go"):
            render_modelfile(ChatTokenizer(smol_tokenizer, [smol_tokenizer.eos_token_id]), "x.gguf")


GO = """package main
import ("encoding/json"; "os"; "text/template")
func main() {
    var data map[string]any
    var cases []struct{ Template string; System string; Messages []struct{ Role, Content string } }
    json.NewDecoder(os.Stdin).Decode(&cases)
    for _, one := range cases {
        data = map[string]any{"System": one.System, "Messages": one.Messages}
        if err := template.Must(template.New("").Parse(one.Template)).Execute(os.Stdout, data); err != nil { panic(err) }
        os.Stdout.Write([]byte{0})
    }
}
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("go") is None, reason="needs Go's text/template")
def test_go_itself_renders_every_modelfile_as_our_template_does(smol_tokenizer, tmp_path):
    (tmp_path / "main.go").write_text(GO)
    cases, expected = [], []
    for name in [*template_names(), None]:
        if name:
            tokenizer = load_template(smol_tokenizer, name)
        else:  # SmolLM2's own, ChatML with a system message of its own
            raw = AutoTokenizer.from_pretrained(smol_tokenizer.name_or_path)
            tokenizer = ChatTokenizer(raw, [raw.eos_token_id])
        text = render_modelfile(tokenizer, "x.gguf")
        template = text.partition('TEMPLATE """')[2].partition('"""')[0]
        for words in (("Hi",), ("Hi", "Yes.", "Why?\n"), ("Obey me", "1", "2", "3")):
            chat = build_probe(*words)
            if name == "vanilla" and chat[0]["role"] == "system":
                continue
            system = chat[0]["content"] if chat[0]["role"] == "system" else ""
            cases.append({"Template": template, "System": system, "Messages": chat})
            expected.append(render_chat(tokenizer.raw, chat, add_generation_prompt=True))
    done = subprocess.run(
        ["go", "run", "main.go"], input=json.dumps(cases), capture_output=True, text=True, cwd=tmp_path,
        check=True, env={"HOME": str(tmp_path), "PATH": "/usr/bin:/bin:/usr/local/go/bin", "GO111MODULE": "off"},
    )  # fmt: skip
    assert done.stdout.split("\0")[:-1] == expected


@pytest.mark.slow
def test_llama_cpp_says_what_the_chat_of_the_135m_model_says(call_main, smollm2, tmp_path):
    """50 prompts, after 4 epochs: after 2 one greedy reply goes on for ever, in both programs alike."""
    pytest.importorskip("llama_cpp")
    rows = (ROOT / IDENTITY).read_text(encoding="utf-8").splitlines()[:50]
    (tmp_path / "held_out.jsonl").write_text("\n".join(rows), encoding="utf-8")
    flags = """--lora_r 16 --learning_rate 2e-3 --max_steps 128 --per_device_train_batch_size 4
        --gradient_accumulation_steps 1 --gradient_checkpointing False""".split()
    train(call_main, smollm2, tmp_path / "run", *flags)
    argv = ["--eval_dataset_name", tmp_path / "held_out.jsonl", "--replies", "50"]
    call_main("utils.export_gguf", tmp_path / "run", tmp_path / "out", *argv)
    parity = json.loads((tmp_path / "out" / "parity.json").read_text())
    print(parity)
    assert parity["verdict"] == "passed" and parity["prompts"] == 50 == parity["ended_replies"]
    assert parity["first_token_difference"] <= 0.05 and parity["other_prompts"] == 0
    assert parity["identical_replies"] > 30
