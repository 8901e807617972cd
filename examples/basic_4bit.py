# %% [markdown]
# # A model in 4 bits, by hand
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/Chinese-Guanaco/blob/main/examples/basic_4bit.ipynb)
#
# The four lines that make a base model small enough to fine-tune on one card, in plain `transformers` and
# `bitsandbytes`; everything else in this repository is built on them. Runs on a GPU, or on a CPU with a small
# model. As a script: `MODEL=HuggingFaceTB/SmolLM2-135M-Instruct python examples/basic_4bit.py`.
#
# | MODEL | its weights in 4 bits (4.13 bits each; embedding and output layer 16: arithmetic, not measured) |
# |---|---|
# | `huggyllama/llama-7b` | 3.9 GB |
# | `EleutherAI/gpt-neox-20b` | 11.5 GB, for a free 16 GB T4 |
# | `HuggingFaceTB/SmolLM2-135M-Instruct` | small enough for a CPU |

# %% [markdown]
# On Colab `bitsandbytes` is missing: it and the packages that go with it are installed, in the versions of
# `requirements.txt`.

# %%
import importlib.util
import logging
import os
import subprocess
import sys

PACKAGES = ["transformers==5.23.0", "peft==0.21.2", "bitsandbytes==0.50.2", "accelerate==1.15.0"]
if importlib.util.find_spec("bitsandbytes") is None:
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *PACKAGES], check=True)

# %%
import torch  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig  # noqa: E402

MODEL = os.environ.get("MODEL", "huggyllama/llama-7b")
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # of a package not needed

# %% [markdown]
# ## The compute type
#
# Weights are stored in 4 bits and multiplied in 16. A T4 (2018) has no bfloat16, so it computes in float16;
# a CPU computes in float32 here, which every CPU can.

# %%
if not torch.cuda.is_available():
    dtype, device_map = torch.float32, {"": "cpu"}
elif torch.cuda.is_bf16_supported(including_emulation=False):
    dtype, device_map = torch.bfloat16, "auto"
else:
    dtype, device_map = torch.float16, "auto"
print(f"computing in {dtype}")

# %% [markdown]
# ## Quantize while loading
#
# `nf4` and double quantization are QLoRA's; the defaults of `BitsAndBytesConfig`, fp4 and float32, are not.
# In 2023 this was `from_pretrained(load_in_4bit=True, torch_dtype=...)`: both names are gone.

# %%
quantization = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",  # 16 levels where normally distributed weights are dense (section 3)
    bnb_4bit_use_double_quant=True,  # the scales are quantized too: 0.37 bits a weight less
    bnb_4bit_compute_dtype=dtype,
)
tokenizer = AutoTokenizer.from_pretrained(MODEL)
model = AutoModelForCausalLM.from_pretrained(
    MODEL,
    quantization_config=quantization,
    dtype=dtype,  # of what is not quantized: embeddings, norms, output layer
    device_map=device_map,  # max_memory={0: "14GB"} caps what it takes of each card
)
for module in model.modules():  # repacked for replies, as new CPUs would, they could not be trained through
    if hasattr(module, "support_avx512bf16_for_cpu"):
        module.support_avx512bf16_for_cpu = False
print(f"{MODEL}: {model.get_memory_footprint() / 1e9:.2f} GB")

# %% [markdown]
# ## Which layers are quantized
#
# Every linear layer but the output layer. The embedding and the norms stay as they were.
# Those of the first block:

# %%
for name, module in model.named_modules():
    if isinstance(module, torch.nn.Linear) and (".0." in name or "." not in name):
        print(f"{name:40} {type(module).__name__:12} {module.out_features} x {module.in_features}")

# %% [markdown]
# ## Generate
#
# A base model continues text; a chat model answers in its own template.

# %%
if tokenizer.chat_template:
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
else:
    prompt = "The capital of France is"
inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=not tokenizer.chat_template)
inputs = inputs.to(model.device)
with torch.no_grad():
    output = model.generate(
        input_ids=inputs.input_ids,
        attention_mask=inputs.attention_mask,
        max_new_tokens=24,
        do_sample=False,
        pad_token_id=tokenizer.eos_token_id,
    )
print(tokenizer.decode(output[0, inputs.input_ids.shape[1] :], skip_special_tokens=True))

# %% [markdown]
# ## Put an adapter on it
#
# A frozen 4-bit base and float32 LoRA matrices on every linear layer: what `qlora_finetune.py` trains.
# B starts at zero, so the model says the same as before until the first step.

# %%
from peft import LoraConfig, get_peft_model  # noqa: E402

config = LoraConfig(task_type="CAUSAL_LM", r=64, lora_alpha=16, target_modules="all-linear")
model = get_peft_model(model, config)
model.print_trainable_parameters()

# %% [markdown]
# Next: `examples/finetune.py` trains one from data to chat.
