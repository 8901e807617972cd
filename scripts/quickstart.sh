#!/usr/bin/env bash
# From a fresh machine to a model that knows its new name: install, train 4-bit QLoRA, chat. No GPU needed.
#   model  SmolLM2-135M-Instruct      data  data/guanaco_identity.jsonl, 128 rows, Chinese and English
#   time   docs/results.md, "Quickstart"; 2 GiB of memory
#   bash scripts/quickstart.sh [flags of qlora_finetune.py, such as --overwrite_output_dir]
[ -n "${BASH_VERSION:-}" ] || { echo "error: this script needs bash: bash $0 $*" >&2; exit 2; }
set -euo pipefail
own="--output_dir"
source "$(dirname "$0")/usage.sh" "$@"
cd "$(dirname "$0")/.."
source scripts/install.sh

model=models/SmolLM2-135M-Instruct
run=output/quickstart

args=(
  # model
  --model_name_or_path "$model" --bits 4 --double_quant --quant_type nf4
  # data
  --dataset_name data/guanaco_identity.jsonl --eval_dataset_name data/guanaco_identity_eval.jsonl
  # adapter
  --lora_r 16 --lora_alpha 16
  # training
  --do_train --do_eval --num_train_epochs 2.5 --per_device_train_batch_size 8 --gradient_accumulation_steps 1
  --learning_rate 1e-3 --lr_scheduler_type constant --gradient_checkpointing False --seed 0
  # the same questions before and after
  --sample_generate --sample_prompts data/sample_prompts.jsonl --max_new_tokens 32
  # output
  --output_dir "$run" --logging_steps 1
)

python -m utils.starter_model "$model"
finished=$(grep -s '"status": "finished"' "$run/run.json" || true)
echo; echo "== training: step 0 is the model before, the last step the model after"
python qlora_finetune.py "${args[@]}" "$@"
if [ -n "$finished" ] && [[ " $* " != *" --overwrite_output_dir "* ]]; then exit 0; fi
activate="source .venv/bin/activate"
[ "$environment" = "$PWD/.venv" ] || activate="# in $environment:"
cat <<END

The run is in $run: adapter, run.json, metrics.json, training_curve.png. Chat with it, then train your own:
  $activate
  python cli_demo.py --checkpoint_dir $run
  python qlora_finetune.py --model_name_or_path $model --dataset_name YOUR.jsonl --output_dir output/mine
END
