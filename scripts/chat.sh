#!/usr/bin/env bash
# Chat with a run in the terminal: another run with  bash scripts/chat.sh --checkpoint_dir RUN
#   model    the run's; base, bits and template come from its run.json
[ -n "${BASH_VERSION:-}" ] || { echo "error: this script needs bash: bash $0 $*" >&2; exit 2; }
set -euo pipefail
repo=$(cd "$(dirname "$0")/.." && pwd)  # paths are relative to where this is called from

args=(
  # run
  --checkpoint_dir output/guanaco-7b
  # generation
  --max_new_tokens 512 --do_sample --temperature 0.7 --top_p 0.9
)

python "$repo/cli_demo.py" "${args[@]}" "$@"
