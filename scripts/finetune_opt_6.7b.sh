#!/usr/bin/env bash
# OPT-6.7B on oasst1, 4-bit QLoRA. Its positions follow the mask: batches are padded, not packed.
#   model    facebook/opt-6.7b
#   data     oasst1 (timdettmers/openassistant-guanaco), 3 epochs in steps of 32 rows
#   gpu      one with 22 GiB free is enough for 4 rows of 1,024 tokens
#   memory   20.2 GiB held for 4x1024 under 22, 10 of 32 layers recomputed, random weights (python -m eval.memory --promises)
#   time     3.8 steps of 4 rows of 1,024 tokens a second, random weights, one H100; the whole run was not made here
[ -n "${BASH_VERSION:-}" ] || { echo "error: this script needs bash: bash $0 $*" >&2; exit 2; }
set -euo pipefail
repo=$(cd "$(dirname "$0")/.." && pwd)  # paths are relative to where this is called from
export PYTHONPATH="$repo${PYTHONPATH:+:$PYTHONPATH}"

model=models/opt-6.7b
if [ ! -d "$model" ]; then  # published as pickles: converted to safetensors once
  hf download facebook/opt-6.7b --local-dir models/opt-6.7b-downloaded
  python -m utils.convert_weights models/opt-6.7b-downloaded "$model"
fi

args=(
  # model
  --model_name_or_path "$model" --bits 4 --double_quant --quant_type nf4
  # data
  --dataset_name oasst1 --source_max_len 512 --target_max_len 512
  # adapter
  --lora_r 64 --lora_alpha 16 --lora_dropout 0.05
  # training
  --do_train --do_eval --num_train_epochs 3
  --per_device_train_batch_size 4 --gradient_accumulation_steps 8 --per_device_eval_batch_size 8
  --learning_rate 2e-4 --lr_scheduler_type constant --max_grad_norm 0.3 --seed 0
  # output
  --output_dir output/oasst1-opt-6.7b --logging_steps 10
  --eval_strategy steps --eval_steps 200 --save_steps 200 --save_total_limit 3
)

python "$repo/qlora_finetune.py" "${args[@]}" "$@"
