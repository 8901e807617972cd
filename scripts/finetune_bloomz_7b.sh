#!/usr/bin/env bash
# BLOOMZ-7B1 on Alpaca, 4-bit QLoRA. ALiBi positions: batches are padded, not packed.
#   model    bigscience/bloomz-7b1
#   data     tatsu-lab/alpaca, 52,002 rows, 3 epochs in steps of 32 rows
#   gpu      one with 22 GiB free is enough for 4 rows of 768 tokens
#   memory   21.4 GiB held for 4x768 under 22, half of the layers recomputed, random weights (python -m eval.memory --promises)
#   time     2.5 steps of 4 rows of 768 tokens a second, random weights, one H100; the whole run was not made here
[ -n "${BASH_VERSION:-}" ] || { echo "error: this script needs bash: bash $0 $*" >&2; exit 2; }
set -euo pipefail
repo=$(cd "$(dirname "$0")/.." && pwd)  # paths are relative to where this is called from

args=(
  # model
  --model_name_or_path bigscience/bloomz-7b1 --bits 4 --double_quant --quant_type nf4
  # data
  --dataset_name alpaca --source_max_len 512 --target_max_len 256
  # adapter
  --lora_r 64 --lora_alpha 16 --lora_dropout 0.05
  # training
  --do_train --do_eval --num_train_epochs 3
  --per_device_train_batch_size 4 --gradient_accumulation_steps 8 --per_device_eval_batch_size 8
  --learning_rate 2e-4 --lr_scheduler_type constant --max_grad_norm 0.3 --seed 0
  # output
  --output_dir output/alpaca-bloomz-7b --logging_steps 10
  --eval_strategy steps --eval_steps 200 --save_steps 200 --save_total_limit 3
)

python "$repo/qlora_finetune.py" "${args[@]}" "$@"
