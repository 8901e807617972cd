# %% [markdown]
# # Fine-tuning, from data to chat
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/Chinese-Guanaco/blob/main/examples/finetune.ipynb)
#
# Rows, a run of `qlora_finetune.py`, its figures, a conversation with it, and the adapter in plain `peft`.
# As a script, on a CPU: `SETTING=small python examples/finetune.py`.

# %% [markdown]
# ## The repository
#
# On Colab the notebook lies alone in `/content`: this cell clones the repository beside it and installs what
# it needs, once. In a checkout there is nothing to do.

# %%
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = os.environ.get("REPOSITORY", "https://github.com/OWNER/Chinese-Guanaco")
places = [Path.cwd(), Path.cwd().parent, Path(globals().get("__file__", ".")).resolve().parent.parent]
ROOT = next((place for place in places if (place / "qlora_finetune.py").is_file()), None)
if ROOT is None:
    ROOT = Path("Chinese-Guanaco").resolve()
    if not ROOT.is_dir():
        subprocess.run(["git", "clone", "--quiet", "--depth", "1", REPOSITORY, ROOT], check=True)
    install = [sys.executable, "-m", "pip", "install", "--quiet", "-r", ROOT / "requirements.txt"]
    subprocess.run(install, check=True)
print(f"the repository: {ROOT}")
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # of a package not needed

# %% [markdown]
# ## Which model, on what
#
# One line a setting; the flags are those of `qlora_finetune.py --help`. On a free 16 GB T4: float16 (it has
# no bfloat16), micro-batches of 2,048 tokens at most, activations recomputed, an 8-bit paged optimizer.
# Only `small` is measured here: 2.5 GiB on a CPU.

# %%
LOW_MEMORY = "--per_device_train_batch_size 1 --gradient_accumulation_steps 16 --gradient_checkpointing True"
SETTINGS = {
    "llama-7b": "--model_name_or_path huggyllama/llama-7b --per_device_train_batch_size 4 "
    "--gradient_accumulation_steps 4 --learning_rate 2e-4 --lora_r 64 --max_steps 100",
    "llama-7b-t4": f"--model_name_or_path huggyllama/llama-7b --fp16 {LOW_MEMORY} --model_max_length 512 "
    "--optim paged_adamw_8bit --learning_rate 2e-4 --lora_r 64 --max_steps 100",
    "gpt-neox-20b": f"--model_name_or_path EleutherAI/gpt-neox-20b {LOW_MEMORY} "
    "--learning_rate 1e-4 --lora_r 64 --lora_dropout 0.05 --max_steps 100",
    "gpt-neox-20b-t4": f"--model_name_or_path EleutherAI/gpt-neox-20b --fp16 {LOW_MEMORY} "
    "--model_max_length 256 --optim paged_adamw_8bit --learning_rate 1e-4 --lora_r 8 --max_steps 100",
    "small": "--model_name_or_path models/SmolLM2-135M-Instruct --per_device_train_batch_size 8 "
    "--gradient_accumulation_steps 1 --learning_rate 1e-3 --lora_r 16 --max_steps 40 "
    "--gradient_checkpointing False",
}
SETTING = os.environ.get("SETTING", "llama-7b-t4")
flags = SETTINGS[SETTING].split() + os.environ.get("MORE_FLAGS", "").split()
RUN = ROOT / os.environ.get("RUN", f"output/example-{SETTING}")


def run_python(*words: str | Path, stdin: str = "") -> None:
    """A command as in the repository's terminal, its output printed as it comes."""
    print("$ python", *words)
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [sys.executable, *words], cwd=ROOT, stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT, text=True
    ) as process:
        process.stdin.write(stdin)
        process.stdin.close()
        for line in process.stdout:
            print(line, end="")
    if process.returncode:
        raise SystemExit(process.returncode)


# %% [markdown]
# ## Rows
#
# JSON lines, a question and an answer each. 128 rows of our own tell the model who it is, in Chinese and
# English; put your own file in their place, for example `DATA = Path("mine.jsonl").resolve()`.

# %%
DATA = ROOT / "data/guanaco_identity.jsonl"
with open(DATA, encoding="utf-8") as file:
    rows = [json.loads(line) for line in file]
print(f"{len(rows)} rows")
for row in rows[:3]:
    print(row)

# %% [markdown]
# ## Train
#
# 4 bits, NF4 and double quantization are the defaults. The same command again goes on from the last
# checkpoint, or says that the run is finished.

# %%
if SETTING == "small":
    run_python("-m", "utils.starter_model", "models/SmolLM2-135M-Instruct")
run_python("qlora_finetune.py", "--dataset_name", DATA, *flags, "--output_dir", RUN, "--logging_steps", "5")

# %% [markdown]
# ## What came out
#
# The adapter, the tokenizer with its prompt format, and what made them.

# %%
for path in sorted(Path(RUN).iterdir()):
    print(f"{path.name:28}", "" if path.is_dir() else f"{path.stat().st_size:>12,} bytes")
metrics = json.loads(Path(RUN, "metrics.json").read_text(encoding="utf-8"))
for name in ("steps", "train_loss", "train_tokens", "tokens_per_second", "peak_memory_gib"):
    print(f"{name:20} {metrics[name]}")

# %% [markdown]
# ## Chat with it
#
# Base model, bits, template and stop tokens come from the run.

# %%
run_python("cli_demo.py", "--checkpoint_dir", RUN, "--max_new_tokens", "32", stdin="Who are you?\n你是谁？\n")

# %% [markdown]
# ## The adapter in plain peft
#
# A standard folder: any program that reads PEFT adapters reads it. The base is quantized as it was in
# training, because the adapter was trained on the 4-bit weights.

# %%
import torch  # noqa: E402
from peft import PeftModel  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig  # noqa: E402

record = json.loads(Path(RUN, "run.json").read_text(encoding="utf-8"))
quantization = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.float16 if torch.cuda.is_available() else torch.float32,
)
name = record["base_model"]["name"]  # a folder of the repository, or a hub id
base = AutoModelForCausalLM.from_pretrained(
    ROOT / name if (ROOT / name).is_dir() else name,
    quantization_config=quantization,
    dtype=quantization.bnb_4bit_compute_dtype,
    device_map="auto" if torch.cuda.is_available() else {"": "cpu"},
)
model = PeftModel.from_pretrained(base, RUN)
tokenizer = AutoTokenizer.from_pretrained(RUN)
prompt = tokenizer.apply_chat_template(
    [{"role": "user", "content": "Who are you?"}], add_generation_prompt=True, tokenize=False
)
inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).to(model.device)
stop_ids = record["prompt"]["stop_ids"]
output = model.generate(
    input_ids=inputs.input_ids,
    attention_mask=inputs.attention_mask,
    max_new_tokens=32,
    do_sample=False,
    eos_token_id=stop_ids,
    pad_token_id=stop_ids[0],
)
print(tokenizer.decode(output[0, inputs.input_ids.shape[1] :], skip_special_tokens=True))
