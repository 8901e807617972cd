#!/usr/bin/env bash
# LLaMA-7B on Alpaca, 8-bit LoRA: 2023's values, but on all linear layers.
#   model    huggyllama/llama-7b
#   data     tatsu-lab/alpaca, 52,002 rows, 3 epochs in steps of 32 rows
#   gpu      one with 22 GiB free is enough for 4 rows of 2,048 tokens
#   memory   21.5 GiB held for 4x2048 under 22, in bfloat16, random weights (python -m eval.memory --promises)
#   time     2.0 steps of 4 rows of 2,048 tokens a second, random weights, one H100; the whole run was not made here
[ -n "${BASH_VERSION:-}" ] || { echo "error: this script needs bash: bash $0 $*" >&2; exit 2; }
set -euo pipefail
repo=$(cd "$(dirname "$0")/.." && pwd)  # paths are relative to where this is called from

args=(
  # model
  --model_name_or_path huggyllama/llama-7b --bits 8 --fp16
  # data
  --dataset_name alpaca --model_max_length 2048
  # adapter
  --lora_r 8 --lora_alpha 16 --lora_dropout 0.05
  # training; --warmup_steps below 1 is a share of all steps
  --do_train --num_train_epochs 3
  --per_device_train_batch_size 4 --gradient_accumulation_steps 8 --per_device_eval_batch_size 4
  --learning_rate 1e-4 --lr_scheduler_type cosine --warmup_steps 0.03 --weight_decay 0.0
  --max_grad_norm 1.0 --seed 42
  # output
  --output_dir output/alpaca-llama-7b-int8 --logging_steps 1 --eval_strategy no
  --save_steps 500 --save_total_limit 5
)

python "$repo/qlora_int8_finetune.py" "${args[@]}" "$@"
