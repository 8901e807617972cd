#!/usr/bin/env bash
# What does quantizing the base cost? One set, five bases, three seeds, held-out losses before and after.
#   bf16     16 bits: the others are held against it
#   int8     8 bits
#   nf4, fp4 4 bits with double quantization
#   full     no adapter: every weight is trained, in 32 bits, at a learning rate of 2e-5
#   model    SmolLM2-135M-Instruct
#   data     data/guanaco_identity.jsonl and its 12 held-out rows; of --data FILE 100 rows are held out
#   time     not measured here
# Started again, it goes on where it was stopped: a finished run is not repeated.
#   bash scripts/quantization.sh [--data FILE.jsonl] [--seeds "0 1 2"] [flags of qlora_finetune.py]
[ -n "${BASH_VERSION:-}" ] || { echo "error: this script needs bash: bash $0 $*" >&2; exit 2; }
set -euo pipefail
own="--output_dir --seed --bits --quant_type --double_quant --full_finetune"
source "$(dirname "$0")/usage.sh" "$@"
cd "$(dirname "$0")/.."

model=models/SmolLM2-135M-Instruct
runs=output/quantization
data=(--dataset_name data/guanaco_identity.jsonl --eval_dataset_name data/guanaco_identity_eval.jsonl)
seeds="0 1 2"
while [[ "${1:-}" == --data || "${1:-}" == --seeds ]]; do
  [ $# -gt 1 ] || { echo "error: quantization.sh $1: name its value; bash $0 --help shows how" >&2; exit 2; }
  if [ "$1" = --data ]; then data=(--dataset_name "$2" --eval_dataset_size 100); else seeds=$2; fi
  shift 2
done

args=(
  # model
  --model_name_or_path "$model"
  # data
  --source_max_len 512 --target_max_len 512
  # adapter
  --lora_r 16 --lora_alpha 32
  # training; --warmup_steps below 1 is a share of all steps
  --do_train --do_eval --eval_on_start True --num_train_epochs 3
  --per_device_train_batch_size 8 --gradient_accumulation_steps 2 --gradient_checkpointing False
  --learning_rate 5e-4 --lr_scheduler_type cosine --warmup_steps 0.1
  # output
  --save_strategy no --logging_steps 5 --disable_tqdm True
)
bf16=(--bits 16)
int8=(--bits 8)
nf4=(--bits 4 --quant_type nf4 --double_quant)
fp4=(--bits 4 --quant_type fp4 --double_quant)
full=(--bits 32 --full_finetune --learning_rate 2e-5)

train() {
  echo; echo "== $1"
  python qlora_finetune.py "${args[@]}" "${data[@]}" --output_dir "$runs/$1" "${@:2}"
}

[[ " $* " == *" --model_name_or_path"* ]] || python -m utils.starter_model "$model"
for seed in $seeds; do
  train "bf16-$seed" --seed "$seed" "${bf16[@]}" "$@"
  train "int8-$seed" --seed "$seed" "${int8[@]}" "$@"
  train "nf4-$seed" --seed "$seed" "${nf4[@]}" "$@"
  train "fp4-$seed" --seed "$seed" "${fp4[@]}" "$@"
  train "full-$seed" --seed "$seed" "${full[@]}" "$@"
done
echo
python -m eval.compare_runs "$runs" --settings bf16 int8 nf4 fp4 full --seeds $seeds
