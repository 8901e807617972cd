#!/usr/bin/env bash
# Answer a run's held-out rows into predictions.jsonl, in batches, with the run's own data, split and prompt.
#   model    the run's; base, bits and template come from its run.json
#   gpu      not measured here
#   memory   not measured here
#   time     not measured here
[ -n "${BASH_VERSION:-}" ] || { echo "error: this script needs bash: bash $0 $*" >&2; exit 2; }
set -euo pipefail
repo=$(cd "$(dirname "$0")/.." && pwd)  # paths are relative to where this is called from

args=(
  # run
  --checkpoint_dir output/guanaco-7b
  # generation
  --do_predict --max_eval_samples 100 --per_device_eval_batch_size 8
  --max_new_tokens 512 --do_sample --temperature 0.7 --top_p 0.9
)

python "$repo/qlora_finetune.py" "${args[@]}" "$@"
