#!/usr/bin/env bash
# Guanaco 13B: the QLoRA paper's recipe (arXiv 2305.14314, appendix B.2).
#   model    huggyllama/llama-13b
#   data     oasst1 (timdettmers/openassistant-guanaco), 1,875 steps of 16 rows
#   gpu      one with 14 GiB free is enough for a row of 2,048 tokens
#   memory   13.3 GiB held for 1x2048 under 14, random weights (python -m eval.memory --promises)
#   time     2.9 rows of 2,048 tokens a second, random weights, one H100; the whole run was not made here
[ -n "${BASH_VERSION:-}" ] || { echo "error: this script needs bash: bash $0 $*" >&2; exit 2; }
set -euo pipefail
repo=$(cd "$(dirname "$0")/.." && pwd)  # paths are relative to where this is called from

args=(
  # model
  --model_name_or_path huggyllama/llama-13b --bits 4 --double_quant --quant_type nf4
  # data: the prompt keeps its last 16 tokens in single-turn rows; only the sum, 528, limits chats
  --dataset_name oasst1 --source_max_len 16 --target_max_len 512
  --max_eval_samples 1000
  # adapter
  --lora_r 64 --lora_alpha 16 --lora_dropout 0.1
  # training
  --do_train --do_eval --max_steps 1875
  --per_device_train_batch_size 1 --gradient_accumulation_steps 16 --per_device_eval_batch_size 1
  --learning_rate 2e-4 --lr_scheduler_type constant --weight_decay 0.0
  --adam_beta2 0.999 --max_grad_norm 0.3 --data_seed 42 --seed 0
  # output
  --output_dir output/guanaco-13b --logging_steps 10
  --eval_strategy steps --eval_steps 187 --save_steps 500 --save_total_limit 40
)

python "$repo/qlora_finetune.py" "${args[@]}" "$@"
