#!/usr/bin/env bash
# What a run is worth: benchmarks beside the untuned base, answers to our 80 questions, one report.
#   model    the run's; base, bits and template come from its run.json
#   data     MMLU, CMMLU and C-Eval of lm-evaluation-harness; eval/prompts/ (Chinese and English)
#   gpu      not measured here
#   memory   not measured here
#   time     not measured here
#   bash scripts/evaluate.sh RUN
[ -n "${BASH_VERSION:-}" ] || { echo "error: this script needs bash: bash $0 $*" >&2; exit 2; }
set -euo pipefail
source "$(dirname "$0")/usage.sh" "$@"
repo=$(cd "$(dirname "$0")/.." && pwd)  # paths are relative to where this is called from
export PYTHONPATH="$repo${PYTHONPATH:+:$PYTHONPATH}"

run=${1:-output/guanaco-7b}
if [ $# -gt 1 ] || [ "${run#-}" != "$run" ]; then
  echo "error: evaluate.sh $*: it takes one word, the run: bash scripts/evaluate.sh output/guanaco-7b" >&2; exit 2
fi

python "$repo/qlora_finetune.py" --checkpoint_dir "$run" --do_eval --do_predict --max_eval_samples 200 --max_new_tokens 256
python -m eval.lm_tasks "$run" --tasks mmlu,cmmlu,ceval-valid --base_too
python -m eval.generate_answers "$run" --questions "$repo"/eval/prompts/*.jsonl
python -m eval.report "$run"
