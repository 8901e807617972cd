#!/usr/bin/env bash
# LLaMA-3-8B on oasst1, 4-bit QLoRA: a default of today. The model is gated: `hf auth login` first.
#   model    meta-llama/Meta-Llama-3-8B
#   data     oasst1 (timdettmers/openassistant-guanaco), 2 epochs in steps of 32 rows
#   gpu      one with 22 GiB free is enough for 4 rows of 2,048 tokens
#   memory   16.8 GiB held for 4x2048 under 22, random weights (python -m eval.memory --promises)
#   time     1.8 steps of 4 rows of 2,048 tokens a second; 15,287 tokens a second in 38.0 GiB, random weights, one H100; the whole run was not made here
[ -n "${BASH_VERSION:-}" ] || { echo "error: this script needs bash: bash $0 $*" >&2; exit 2; }
set -euo pipefail
repo=$(cd "$(dirname "$0")/.." && pwd)  # paths are relative to where this is called from

args=(
  # model
  --model_name_or_path meta-llama/Meta-Llama-3-8B --bits 4 --double_quant --quant_type nf4
  # data
  --dataset_name oasst1 --model_max_length 2048 --template guanaco
  # adapter
  --lora_r 64 --lora_alpha 16 --lora_dropout 0.05
  # training; --warmup_steps below 1 is a share of all steps
  --do_train --do_eval --num_train_epochs 2
  --per_device_train_batch_size 4 --gradient_accumulation_steps 8 --per_device_eval_batch_size 8
  --learning_rate 2e-4 --lr_scheduler_type cosine --warmup_steps 0.03 --max_grad_norm 1.0
  --seed 0
  # output
  --output_dir output/oasst1-llama3-8b --logging_steps 10
  --eval_strategy steps --eval_steps 200 --save_steps 200 --save_total_limit 3
)

python "$repo/qlora_finetune.py" "${args[@]}" "$@"
