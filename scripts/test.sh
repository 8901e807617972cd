#!/usr/bin/env bash
# Install what the tests need, then run them.
#   bash scripts/test.sh          the first tier, under 12 minutes on 2 cores after installation
#   bash scripts/test.sh --all    also the tests marked slow (the whole quickstart among them)
# Any other argument goes to pytest:  bash scripts/test.sh tests/test_prompts.py -x
set -euo pipefail
cd "$(dirname "$0")/.."

bash scripts/install.sh
if [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ]; then source .venv/bin/activate; fi

args=(-m "not slow and not gpu")
if [ "${1:-}" = "--all" ]; then
  args=(-m "not gpu")
  shift
fi
ruff check .
ruff format --check .
python -m pytest "${args[@]}" "$@"
