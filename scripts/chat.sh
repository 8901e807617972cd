#!/usr/bin/env bash
# Chat with a run in the terminal: another run with  bash scripts/chat.sh --checkpoint_dir RUN
#   model    the run's; base, bits and template come from its run.json
set -euo pipefail
cd "$(dirname "$0")/.."

args=(
  # run
  --checkpoint_dir output/guanaco-7b
  # generation
  --max_new_tokens 512 --do_sample --temperature 0.7 --top_p 0.9
)

python cli_demo.py "${args[@]}" "$@"
