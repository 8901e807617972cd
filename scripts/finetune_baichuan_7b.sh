#!/usr/bin/env bash
# Baichuan-7B on oasst1, 4-bit QLoRA: values of the 2023 repository.
#   model    baichuan-inc/Baichuan-7B, read as LLaMA: no remote code
#   data     oasst1 (timdettmers/openassistant-guanaco), 4 epochs in steps of 32 rows
#   gpu      one with 22 GiB free is enough for 4 rows of 1,024 tokens
#   memory   21.0 GiB held for 4x1024 under 22, random weights (python -m eval.memory --promises)
#   time     4.1 steps of 4 rows of 1,024 tokens a second, random weights, one H100; the whole run was not made here
[ -n "${BASH_VERSION:-}" ] || { echo "error: this script needs bash: bash $0 $*" >&2; exit 2; }
set -euo pipefail
repo=$(cd "$(dirname "$0")/.." && pwd)  # paths are relative to where this is called from
export PYTHONPATH="$repo${PYTHONPATH:+:$PYTHONPATH}"

model=models/baichuan-7b
if [ ! -d "$model" ] && [ "${1:-}" != --help ]; then  # published as pickles: converted to safetensors once
  hf download baichuan-inc/Baichuan-7B --local-dir models/baichuan-7b-downloaded
  python -m utils.convert_weights models/baichuan-7b-downloaded "$model"
fi

args=(
  # model
  --model_name_or_path "$model" --bits 4 --double_quant --quant_type nf4
  # data
  --dataset_name oasst1 --source_max_len 512 --target_max_len 512
  # adapter
  --lora_r 64 --lora_alpha 16 --lora_dropout 0.1
  # training
  --do_train --do_eval --sample_generate --num_train_epochs 4
  --per_device_train_batch_size 4 --gradient_accumulation_steps 8 --per_device_eval_batch_size 4
  --learning_rate 2e-4 --lr_scheduler_type constant --weight_decay 0.0
  --adam_beta2 0.999 --max_grad_norm 0.3 --data_seed 42 --seed 0
  # output
  --output_dir output/oasst1-baichuan-7b --logging_steps 1 --max_new_tokens 32
  --eval_strategy steps --eval_steps 50 --save_steps 100 --save_total_limit 5
)

python "$repo/qlora_finetune.py" "${args[@]}" "$@"
