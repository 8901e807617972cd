#!/usr/bin/env bash
# Do the fast settings learn what the plain ones learn? One set, two settings, three seeds, held-out losses.
#   plain    padded batches, PEFT's own modules, activations kept
#   fast     rows packed, fused products, activations recomputed
#   model    SmolLM2-135M-Instruct, 4 bits
#   data     data/guanaco_identity.jsonl and its 12 held-out rows; of --data FILE a tenth is held out
#   time     3 minutes on one H100; on 2 CPU cores about 12 (reckoned from shorter runs)
# With one seed both settings begin with the same adapter and read the same rows in the same order, so rounding
# alone may part them. The rule: the mean of their differences, seed by seed, is no larger than the spread of
# the plain losses over seeds (largest - smallest). Where fast is worse by more, the exit code is 1. In 16 bits
# it may be better by more: PEFT rounds small parts of the adapter away.
#   bash scripts/quality.sh [--data FILE.jsonl] [--seeds "0 1 2"] [flags of qlora_finetune.py]
[ -n "${BASH_VERSION:-}" ] || { echo "error: this script needs bash: bash $0 $*" >&2; exit 2; }
set -euo pipefail
own="--output_dir --seed --packing --fast_lora --gradient_checkpointing"
source "$(dirname "$0")/usage.sh" "$@"
cd "$(dirname "$0")/.."

model=models/SmolLM2-135M-Instruct
runs=output/quality
data=(--dataset_name data/guanaco_identity.jsonl --eval_dataset_name data/guanaco_identity_eval.jsonl)
seeds="0 1 2"
while [[ "${1:-}" == --data || "${1:-}" == --seeds ]]; do
  [ $# -gt 1 ] || { echo "error: quality.sh $1: name its value; bash $0 --help shows how" >&2; exit 2; }
  if [ "$1" = --data ]; then data=(--dataset_name "$2" --eval_dataset_size 0.1); else seeds=$2; fi
  shift 2
done

args=(
  # model
  --model_name_or_path "$model" --bits 4 --double_quant --quant_type nf4
  # adapter
  --lora_r 16 --lora_alpha 16
  # training
  --do_train --do_eval --max_steps 16 --per_device_train_batch_size 4 --gradient_accumulation_steps 2
  --learning_rate 5e-4 --lr_scheduler_type constant
  # output
  --overwrite_output_dir --save_strategy no --logging_steps 4 --disable_tqdm True
)
plain=(--packing False --fast_lora False --gradient_checkpointing False)
fast=(--packing True --fast_lora True --gradient_checkpointing True)

train() {
  echo; echo "== $1"
  python qlora_finetune.py "${args[@]}" "${data[@]}" --output_dir "$runs/$1" "${@:2}"
}

python -m utils.starter_model "$model"
for seed in $seeds; do
  train "plain-$seed" --seed "$seed" "${plain[@]}" "$@"
  train "fast-$seed" --seed "$seed" "${fast[@]}" "$@"
done
echo
python -m eval.compare_runs "$runs" --seeds $seeds
