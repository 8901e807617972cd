#!/usr/bin/env bash
# The chat on a page at http://127.0.0.1:7860; another run with  bash scripts/webserver.sh --checkpoint_dir RUN
#   model    the run's; base, bits and template come from its run.json
# For others to reach it:  bash scripts/webserver.sh --server_name 0.0.0.0 --auth NAME:PASSWORD
[ -n "${BASH_VERSION:-}" ] || { echo "error: this script needs bash: bash $0 $*" >&2; exit 2; }
set -euo pipefail
repo=$(cd "$(dirname "$0")/.." && pwd)  # paths are relative to where this is called from

args=(
  # run
  --checkpoint_dir output/guanaco-7b
  # generation
  --max_new_tokens 512 --do_sample --temperature 0.7 --top_p 0.9
)

python "$repo/gradio_webserver.py" "${args[@]}" "$@"
