"""--shard_layers: processes that hold one base together learn what one process learns, and each holds its share."""

import json
import re
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from helpers import IDENTITY
from helpers.models import relative_difference
from helpers.processes import kill_all, run, run_function, start, train_forked, wait_for
from helpers.runs import assert_equal_runs, load_weights, read_log
from safetensors import safe_open
from torch import nn
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from utils.arguments import LoraArguments, ModelArguments
from utils.console import UserError
from utils.fast.loss import ChunkedCrossEntropy, OutputLayer
from utils.fast.sharded_vocabulary import ShardedVocabulary
from utils.models.base import load_base, quantize_linears
from utils.models.sharded import check_covered
from utils.train.needs import rehearse_model

FLAGS = ["--dataset_name", IDENTITY, "--model_max_length", 400, "--lora_r", 8, "--lora_dropout", 0.1]
FLAGS += ["--learning_rate", 1e-2, "--logging_steps", 1, "--ignore_data_report", "--disable_tqdm", "True"]
# Three epochs of 26 rows in steps of 12: the last step of each has two rows, for however many processes.
EPOCHS = ["--num_train_epochs", 3, "--max_train_samples", 26, "--group_by_length", "--save_steps", 2]


def flags_for(processes, rows=12, batch=3):
    accumulation = rows // (processes * batch)
    return ["--per_device_train_batch_size", batch, "--gradient_accumulation_steps", accumulation]


def assert_same(first, second, tolerance):
    assert relative_difference(load_weights(first), load_weights(second)) < tolerance
    for name in ("loss", "grad_norm"):
        assert read_log(first, name) == pytest.approx(read_log(second, name), rel=tolerance)


# A whole run


def test_two_that_share_a_base_equal_one_that_has_it(call_main, small_model, tmp_path, float32_cpu):
    two, one = tmp_path / "two", tmp_path / "one"
    argv = ["--model_name_or_path", small_model, *FLAGS, *EPOCHS]
    argv += ["--do_train", "--do_eval", "--max_eval_samples", 5]
    printed = train_forked(2, *argv, *flags_for(2), "--shard_layers", "--output_dir", two)
    assert "each of 2 processes holds" in printed and "9 steps of 12 rows" in printed
    alone = call_main("qlora_finetune", *argv, *flags_for(1), "--output_dir", one)
    counts = [re.search(r"training [\d,]+ of [\d,]+ parameters", text)[0] for text in (printed, alone)]
    assert counts[0] == counts[1]
    assert_same(two, one, 1e-4)
    evaluated = [json.loads((path / "metrics.json").read_text())["eval_loss"] for path in (two, one)]
    assert evaluated[0] == pytest.approx(evaluated[1], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("others", [[], ["--gradient_checkpointing", "True"], ["--packing", "False"]])
def test_four_that_share_a_base_equal_one_that_has_it(small_model, tmp_path, others):
    four, one = tmp_path / "four", tmp_path / "one"
    run(4, small_model, four, *FLAGS, *EPOCHS, *others, *flags_for(4), "--shard_layers")
    run(1, small_model, one, *FLAGS, *EPOCHS, *others, *flags_for(1))
    assert_same(four, one, 1e-4)


@pytest.mark.slow
def test_killed_run_goes_on_with_two_processes_and_with_one(small_model, tmp_path):
    flags = [*FLAGS, *EPOCHS]
    run(2, small_model, tmp_path / "expected", *flags, *flags_for(2), "--shard_layers")
    for name in ("two", "one"):
        process = start(2, small_model, tmp_path / name, *flags, *flags_for(2), "--shard_layers")
        wait_for(process, tmp_path / name / "checkpoint-4")
        kill_all(process)
    assert "going on from" in run(2, small_model, tmp_path / "two", *flags, *flags_for(2), "--shard_layers")
    assert_equal_runs(tmp_path / "two", tmp_path / "expected")
    refused = run(1, small_model, tmp_path / "one", *flags, *flags_for(2), code=2)
    kept = "--per_device_train_batch_size 3 --gradient_accumulation_steps 4 keeps them"
    assert "rows of a step 12 -> 6, as processes are 2 -> 1" in refused and kept in refused
    assert "going on from" in run(1, small_model, tmp_path / "one", *flags, *flags_for(1))
    assert_same(tmp_path / "one", tmp_path / "expected", 1e-4)


# A real model of 135M

REAL = [*FLAGS, "--learning_rate", 1e-3, "--max_steps", 5, "--max_train_samples", 40, "--save_steps", 1]
REAL += ["--do_train", "--do_eval", "--max_eval_samples", 6]


@pytest.fixture(scope="module")
def unbroken(smollm2, tmp_path_factory):
    """The folder of a run of the real model by two processes that share it."""
    folder = tmp_path_factory.mktemp("real") / "unbroken"
    run(2, smollm2, folder, *REAL, *flags_for(2, 8, 4), "--shard_layers")
    return folder


def assert_plain_peft_agrees(base, folder):
    loss = json.loads((folder / "metrics.json").read_text())["eval_loss"]
    measured = measure_with_plain_peft(base, folder)
    print(f"\nloss of the held-out rows {loss:.6f}, by plain PEFT {measured:.6f}")
    assert measured == pytest.approx(loss, rel=1e-3)


@pytest.mark.slow
def test_real_model_shared_by_two_equals_one_and_its_adapter_is_plain_pefts(smollm2, unbroken, tmp_path):
    run(1, smollm2, tmp_path / "one", *REAL, *flags_for(1, 8, 4))
    assert_same(unbroken, tmp_path / "one", 1e-3)
    assert_plain_peft_agrees(smollm2, unbroken)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 1])
def test_real_model_shared_by_two_is_killed_and_goes_on_with_two_and_with_one(
    smollm2, unbroken, tmp_path, processes
):
    killed = tmp_path / "killed"
    process = start(2, smollm2, killed, *REAL, *flags_for(2, 8, 4), "--shard_layers")
    wait_for(process, killed / "checkpoint-2")
    kill_all(process)
    assert process.returncode == -signal.SIGKILL and not (killed / "checkpoint-4").exists()
    flags = [*REAL, *flags_for(processes, 8, 4), *(["--shard_layers"] if processes > 1 else [])]
    assert re.search(r"going on from .*checkpoint-[23]\b", run(processes, smollm2, killed, *flags))
    print(f"\nadapters differ by {relative_difference(load_weights(killed), load_weights(unbroken)):.1e}")
    assert len(read_log(killed, "loss")) == 5
    if processes == 2:
        assert_equal_runs(killed, unbroken)
    assert_same(killed, unbroken, 1e-3)
    assert_plain_peft_agrees(smollm2, killed)


def read_held_out(base, folder):
    """The chats that a run held out, as our files say; nothing else of ours is in the measurement."""
    from utils.data.rows import load_rows
    from utils.flags.finetune import parse_finetune_flags

    argv = ["--model_name_or_path", base, *REAL, "--output_dir", folder / "unused"]
    model_args, data_args, _, training_args, _ = parse_finetune_flags([*map(str, argv)], "")
    return load_rows(model_args, data_args, training_args).read_held_out("eval", "\n\n")


def measure_with_plain_peft(base, folder):
    """The loss of the answers of the rows that the run held out, by transformers and PEFT alone."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=quantization, dtype=torch.float32)
    for layer in model.modules():
        if isinstance(layer, Linear4bit):
            layer.support_avx512bf16_for_cpu = False
    model, tokenizer = PeftModel.from_pretrained(model, folder).eval(), AutoTokenizer.from_pretrained(base)
    losses = []
    for chat in read_held_out(base, folder):
        *asked, answer = chat.messages
        prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
        prompt_ids, ids = (
            tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
            for text in (prompt, f"{prompt}{answer['content']}<|im_end|>")
        )
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, :-1]
        first = prompt_ids.shape[1]  # of the answer
        losses.append(F.cross_entropy(logits[first - 1 :], ids[0, first:], reduction="none"))
    assert len(losses) == 6
    return torch.cat(losses).mean().item()


# Its parts


def take_plain_kernels():
    """bitsandbytes' own code for odd sizes, as it is written: compiled, it takes half a minute to begin."""
    from bitsandbytes.backends.default import ops

    for name in ("_dequantize_blockwise_compute", "_dequantize_4bit_compute"):
        kernel = getattr(ops, name)
        setattr(ops, name, getattr(kernel, "__wrapped__", kernel))


def load_and_gather(rank, model, compiles):
    """(codes, scales) of every layer as it is put together; what this process holds; bytes of a layer."""
    from utils.fast import sharded_layers
    from utils.models.sharded import load_sharded, measure_held

    if not compiles:
        take_plain_kernels()
    sharded_layers.PIECE = 1000  # so that a matrix has several
    base = load_sharded(ModelArguments(model_name_or_path=str(model)), torch.float32)
    layers = {}
    for number, linears in enumerate(base.shards.linears):
        base.shards.hold(number)
        for name, linear in linears:
            state = linear.weight.quant_state
            tensors = (linear.weight.data, state.absmax, state.offset, state.state2.absmax)
            layers[f"{number}.{name}"] = [x.clone().numpy() for x in tensors]
    ids = torch.arange(3, 20 + rank)[None]  # one token more on the second process
    with torch.no_grad():
        logits = base(input_ids=ids).logits
    slots = sum(slot.nbytes for slot in base.shards.slots)
    return layers, logits.numpy(), measure_held(base), slots


@pytest.fixture
def plain_kernels():
    """take_plain_kernels(), for this test alone."""
    from bitsandbytes.backends.default import ops

    before = dict(vars(ops))
    yield take_plain_kernels
    vars(ops).update(before)


@pytest.fixture
def odd_model(tmp_path):
    """One whose rows are no whole blocks of 64 weights, nor are its matrices."""
    config = LlamaConfig(
        vocab_size=300, hidden_size=48, intermediate_size=81, num_hidden_layers=2, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "odd")
    return tmp_path / "odd"


@pytest.mark.parametrize(
    "name, processes, compiles",
    [
        ("small_model", 2, True),
        ("small_model", 3, True),
        pytest.param("odd_model", 2, True, marks=pytest.mark.slow),
        ("odd_model", 2, False),
    ],
)
def test_shared_layers_are_to_the_bit_what_bitsandbytes_makes_of_the_whole_model(
    request, name, processes, compiles, float32_cpu, plain_kernels
):
    small_model = request.getfixturevalue(name)
    if not compiles:
        plain_kernels()
    found = run_function(processes, load_and_gather, small_model, compiles)
    base = load_base(ModelArguments(model_name_or_path=str(small_model)), torch.float32)
    expected = {
        re.sub(r"^model\.layers\.", "", name): layer
        for name, layer in base.named_modules()
        if isinstance(layer, Linear4bit)
    }
    whole = sum(x.nbytes for x in base.parameters())
    for rank, (layers, logits, held, slots) in enumerate(found):
        assert layers.keys() == expected.keys()
        for name, layer in expected.items():
            state = layer.weight.quant_state
            tensors = (layer.weight.data, state.absmax, state.offset, state.state2.absmax)
            for mine, theirs in zip(layers[name], tensors, strict=True):
                assert (torch.from_numpy(mine) == theirs).all(), name
        with torch.no_grad():
            wanted = base(input_ids=torch.arange(3, 20 + rank)[None]).logits
        assert torch.allclose(torch.from_numpy(logits), wanted, atol=1e-5)
        assert held - slots < 1.1 * whole / processes + 4096


class Head(nn.Module):
    """What OutputLayer asks of a causal model."""

    def __init__(self, weight, bias, softcap):
        super().__init__()
        self.linear = nn.Linear(weight.shape[1], len(weight), bias=bias is not None)
        self.linear.weight, self.linear.bias = (
            nn.Parameter(weight),
            bias if bias is None else nn.Parameter(bias),
        )
        self.requires_grad_(False)
        self.config = self
        self.final_logit_softcapping, self.logit_scale = softcap, 0.5

    def get_text_config(self):
        return self

    def get_output_embeddings(self):
        return self.linear


def draw_head(vocabulary):
    torch.manual_seed(0)
    return torch.randn(vocabulary, 16), torch.randn(vocabulary)


def draw_tokens(rank, vocabulary):
    """Hidden states and targets; each process has another number of them, and the second has no label."""
    generator = torch.Generator().manual_seed(rank)
    hidden = torch.randn(5 + 3 * rank, 16, generator=generator)
    targets = torch.randint(vocabulary, (len(hidden),), generator=generator)
    targets[::2] = -100
    return hidden, torch.full_like(targets, -100) if rank == 1 else targets


def compute_shared_loss(rank, vocabulary, softcap, with_bias):
    weight, bias = draw_head(vocabulary)
    shared = ShardedVocabulary(vocabulary)
    rows = slice(shared.first, shared.end)
    model = Head(weight[rows], bias[rows] if with_bias else None, softcap)
    embedding = nn.Embedding(vocabulary, 16)
    embedding.weight = nn.Parameter(weight[rows], requires_grad=False)
    shared.install(embedding, model.linear)
    hidden, targets = draw_tokens(rank, vocabulary)
    hidden.requires_grad_(True)
    loss = ChunkedCrossEntropy.apply(hidden, targets, OutputLayer(model))
    (2 * loss).backward()
    ids = torch.arange(rank + 2)[None] * 7 % vocabulary
    logits = model.linear(hidden.detach())
    return [x.detach().numpy() for x in (loss, hidden.grad, embedding(ids), logits)]


@pytest.mark.parametrize("softcap, with_bias", [(None, False), (3.0, True)])
def test_loss_over_a_shared_vocabulary_has_autograds_value_and_gradient(softcap, with_bias):
    vocabulary = 101  # which three processes cannot share evenly
    weight, bias = draw_head(vocabulary)
    for rank, found in enumerate(run_function(3, compute_shared_loss, vocabulary, softcap, with_bias)):
        loss, grad, embedded, product = map(torch.from_numpy, found)
        hidden, targets = draw_tokens(rank, vocabulary)
        hidden.requires_grad_(True)
        plain = F.linear(hidden, weight, bias if with_bias else None)
        logits = softcap * torch.tanh(0.5 * plain / softcap) if softcap else 0.5 * plain
        expected = F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum")
        (2 * expected).backward()
        assert torch.allclose(loss, expected, rtol=1e-5)
        assert torch.allclose(grad, hidden.grad, atol=1e-5)
        assert torch.equal(embedded[0], weight[torch.arange(rank + 2) * 7 % vocabulary])
        assert torch.allclose(product, plain, atol=1e-4)


def load_with_a_whole_part(rank, model):
    """Norms made large, as experts are, which no linear layer quantizes."""
    import utils.models.sharded as sharded

    sharded.MOST_WHOLE = 0.5
    try:
        sharded.load_sharded(ModelArguments(model_name_or_path=str(model)), torch.float32)
    except UserError as error:
        return str(error)


def test_process_that_holds_too_much_says_which_weight_is_whole(small_model):
    for said in run_function(2, load_with_a_whole_part, small_model):
        assert re.search(r"each of 2 processes would hold .* as model\.\S+ .* stay whole", said), said


@pytest.mark.parametrize(
    "flags, said",
    [
        ([], "this is one: start several with `accelerate launch --num_processes N"),
        (["--bits", "8"], "--bits is 8"),
        (["--sample_generate"], "leave --sample_generate out"),
        (["--fast_lora", "False"], "leave --fast_lora False out"),
        (["--do_train", "--do_predict"], "leave --do_predict out"),
    ],
)
def test_what_shared_layers_do_not_cover_is_refused_before_weights_load(
    call_main, small_model, tmp_path, monkeypatch, flags, said
):
    if flags:
        monkeypatch.setenv("WORLD_SIZE", "2")
    argv = ["--model_name_or_path", small_model, *FLAGS, "--output_dir", tmp_path / "run"]
    with pytest.raises(UserError, match=re.escape(said)):
        call_main("qlora_finetune", *argv, "--shard_layers", *flags)


def test_model_whose_matrices_are_stored_transposed_is_refused():
    """GPT-2's: bitsandbytes packs the transpose, whose rows are no rows of the file."""
    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=2, n_head=2))
        quantize_linears(model, ModelArguments(), torch.float32)
    with pytest.raises(UserError, match=re.escape("does not cover gpt2: its matrices are [in, out]")):
        check_covered(model)


# The plan


def test_dry_run_names_every_way_and_what_each_gpu_holds(call_main, small_model, tmp_path):
    argv = ["--model_name_or_path", small_model, *FLAGS, "--output_dir", tmp_path / "run"]
    printed = call_main("qlora_finetune", *argv, "--dry_run", "--num_gpus", 4, "--max_memory_MB", 24000)
    ways = re.findall(r"^ +[\d.]+ GiB a GPU.*  (\S.*): fits$", printed, flags=re.MULTILINE)
    assert ways[0] == "one GPU, or a copy on each of 4 (scripts/distributed/)"
    assert ways[-1] == "one base that 4 GPUs share (--shard_layers)"
    with pytest.raises(UserError, match="accelerate launch --multi_gpu --num_processes 4"):
        call_main("qlora_finetune", *argv, "--num_gpus", 4)


def test_plan_of_a_shared_base_counts_a_share_of_it_and_two_layers():
    config = LlamaConfig(
        vocab_size=1024, hidden_size=512, intermediate_size=1408, num_hidden_layers=6, num_attention_heads=8
    )
    step = rehearse_model(config, ModelArguments(), LoraArguments(), torch.bfloat16, True, offload=False)
    alone = step.measure(1, 256, 0, "adamw_torch")
    step.shares = 4
    shared = step.measure(1, 256, 0, "adamw_torch")
    weights = 6 * (4 * 512 * 512 + 3 * 512 * 1408)
    assert alone.codes == weights // 2 and shared.codes == weights // 8
    assert shared.other_weights == alone.other_weights // 4
    layers = 2 * (alone.codes + alone.scales) // 6
    assert shared.gathered - layers == pytest.approx(2 * 4 * 2**25, rel=1e-6)  # logits, twice in float32
    assert (shared.adapter, shared.gradients) == (alone.adapter, alone.gradients)


# Memory


def save_1b(folder):
    """A random LLaMA of a billion weights in bfloat16, written a layer at a time; as Qwen2.5 a large vocabulary."""
    from safetensors.torch import save_file

    torch.manual_seed(0)
    hidden, gate, keys, vocabulary, layers = 1536, 6144, 256, 151936, 24
    folder.mkdir()
    shapes = {f"self_attn.{name}_proj": (hidden, hidden) for name in "qo"}
    shapes |= {f"self_attn.{name}_proj": (keys, hidden) for name in "kv"}
    shapes |= {
        "mlp.gate_proj": (gate, hidden),
        "mlp.up_proj": (gate, hidden),
        "mlp.down_proj": (hidden, gate),
    }
    shapes |= {"input_layernorm": (hidden,), "post_attention_layernorm": (hidden,)}
    for layer in range(layers):
        tensors = {
            f"model.layers.{layer}.{name}.weight": draw_weight(shape) for name, shape in shapes.items()
        }
        save_file(tensors, folder / f"model-{layer}.safetensors", {"format": "pt"})
    ends = {"model.embed_tokens": (vocabulary, hidden), "model.norm": (hidden,)}
    tensors = {f"{name}.weight": draw_weight(shape) for name, shape in ends.items()}
    save_file(tensors, folder / "model-ends.safetensors", {"format": "pt"})
    files = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            files |= dict.fromkeys(opened.keys(), file.name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=gate,
        num_hidden_layers=layers,
        num_attention_heads=24,
        num_key_value_heads=4,
        tie_word_embeddings=True,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(folder)
    return folder


def draw_weight(shape):
    return (
        torch.ones(shape, dtype=torch.bfloat16) if len(shape) == 1 else 0.02 * torch.randn(shape).bfloat16()
    )


class AnonymousMemory(threading.Thread):
    """The most that this process holds, in MiB above what it held before: its own pages, none of a file."""

    def __init__(self):
        super().__init__(daemon=True)
        self.before = self.most = self.read()
        self.start()

    def read(self):
        text = Path("/proc/self/status").read_text()
        return int(re.search(r"RssAnon:\s+(\d+)", text).group(1)) / 1024

    def run(self):
        while True:
            self.most = max(self.most, self.read())
            time.sleep(0.005)

    def take(self):
        most, self.most = self.most, self.read()
        return most - self.before


def measure_1b(rank, folder, shared):
    """MiB above a process that has imported the libraries: the peak while loading, that of a micro-batch; its loss."""
    from utils.arguments import TrainingArguments
    from utils.fast.model import prepare_fast_model
    from utils.models.adapter import load_model

    memory = AnonymousMemory()
    model_args = ModelArguments(model_name_or_path=str(folder), shard_layers=shared)
    model, dtype = load_model(model_args, LoraArguments(lora_r=4), TrainingArguments())
    loading = memory.take()
    fast = prepare_fast_model(model, dtype)
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    model.train()
    ids = torch.arange(64)[None]
    batch = {"input_ids": ids, "labels": ids, "position_ids": ids, "token_keys": ids, "max_length": 64}
    batch |= {"label_positions": torch.arange(63), "cu_seqlens": torch.tensor([0, 64], dtype=torch.int32)}
    loss = fast.run(batch, torch.ones(()) / 63)
    return loading, memory.take(), loss.item() / 63


@pytest.mark.slow
def test_memory_of_a_process_falls_as_more_share_a_model_of_a_billion_weights(tmp_path, float32_cpu):
    folder = save_1b(tmp_path / "1b")
    ((alone, alone_training, loss),) = run_function(1, measure_1b, folder, False)
    for loading, training, shared_loss in run_function(2, measure_1b, folder, True):
        print(f"\nloading {alone:.0f} -> {loading:.0f} MiB, a step {alone_training:.0f} -> {training:.0f}")
        assert alone / loading > 1.7 and alone_training / training > 1.7
        assert shared_loss == pytest.approx(loss, rel=1e-3)
