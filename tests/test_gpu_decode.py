"""Replies of a real model on a GPU: what the plain model says, by our kernels, and faster from its own prompt."""

import time

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer, DynamicCache, GenerationConfig

from utils.arguments import ModelArguments
from utils.fast.cuda_c import find_kernel_obstacle
from utils.fast.decode_loop import stream_tokens
from utils.fast.decode_setup import install_graph_decode
from utils.models.base import load_base

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
TEXT = (
    "The river rises in the hills north of the old mill, runs past the village and the stone bridge, and "
    "reaches the sea after ninety miles. In spring the meadows beside the river are flooded for weeks, and "
    "the farmers move their sheep to the hills north of the old mill. In summer the river is so low that "
    "children walk across it beside the stone bridge. "
)


def load(smollm2, dtype, bits=4):
    model = load_base(ModelArguments(str(smollm2), bits=bits), dtype, trainable=False)
    torch.manual_seed(0)
    config = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, config).eval()
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.003)
    model.generation_config.eos_token_id = None  # replies of a length that is known
    return model, AutoTokenizer.from_pretrained(smollm2)


def ask(tokenizer, text):
    chat = [{"role": "user", "content": text}]
    return tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)


@torch.no_grad()
def reply(decoder, prompt, count, proposed=0):
    cache = DynamicCache(config=decoder.config)
    choice = decoder.find_choice(GenerationConfig(pad_token_id=0, eos_token_id=None))
    torch.cuda.synchronize()
    start = time.perf_counter()
    tokens = list(stream_tokens(decoder, prompt, cache, choice, count, [], proposed))
    return tokens, time.perf_counter() - start


@torch.no_grad()
def next_logits(forward, ids):
    return forward(input_ids=torch.tensor([ids], device="cuda"), use_cache=False).logits[0, -1].float()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_real_model_says_what_it_says_without_the_kernels(smollm2, dtype, capsys):
    """Token for token, until two tokens are as likely but for 16 bits of rounding: both are then shown."""
    assert find_kernel_obstacle() is None
    model, tokenizer = load(smollm2, dtype)
    plain = model.get_base_model().forward
    prompts = [ask(tokenizer, text) for text in ("Who are you?", "Name three rivers.", TEXT + "Sum this up.")]
    expected = []
    for prompt in prompts:
        ids = torch.tensor([prompt], device="cuda")
        flags = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": 64}
        said = model.generate(ids, **flags)[0, len(prompt) :].tolist()
        expected.append((said, [next_logits(plain, prompt + said[:i]) for i in range(64)]))
    decoder = install_graph_decode(model)
    for prompt, (said, logits) in zip(prompts, expected, strict=True):
        got, _ = reply(decoder, prompt, 64)
        differs = next((i for i, (a, b) in enumerate(zip(got, said, strict=True)) if a != b), None)
        if differs is not None:
            ours, theirs = (logits[differs][tokens[differs]].item() for tokens in (got, said))
            with capsys.disabled():
                print(f"token {differs}: {theirs:.4f} by generate, {ours:.4f} by us")
            assert theirs - ours < 0.02 * abs(theirs)
    assert decoder.whole is not None and decoder.graphs and not decoder.obstacle
    assert "replies:" not in capsys.readouterr().out


def test_prompt_lookup_is_faster_where_the_reply_repeats_the_prompt(smollm2):
    model, tokenizer = load(smollm2, torch.bfloat16)
    decoder = install_graph_decode(model)
    prompt = ask(tokenizer, f"Repeat this text word for word:\n\n{TEXT}")
    results = {}
    for proposed in (0, 7):
        reply(decoder, prompt, 96, proposed)  # captures
        results[proposed] = reply(decoder, prompt, 96, proposed)
    print({proposed: f"{96 / seconds:.0f} tokens/s" for proposed, (_, seconds) in results.items()})
    assert results[7][0] == results[0][0]
    assert results[0][1] / results[7][1] > 1.5
