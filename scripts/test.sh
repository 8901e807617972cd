#!/usr/bin/env bash
# Install what the tests need, then run them.
#   bash scripts/test.sh          the first tier, under 12 minutes on 2 cores after installation
#   bash scripts/test.sh --all    also the tests marked slow (the whole quickstart among them)
# Any other argument goes to pytest:  bash scripts/test.sh tests/test_prompts.py -x
[ -n "${BASH_VERSION:-}" ] || { echo "error: this script needs bash: bash $0 $*" >&2; exit 2; }
set -euo pipefail
source "$(dirname "$0")/usage.sh" "$@"
cd "$(dirname "$0")/.."

source scripts/install.sh

# The page's tests use a real browser; without one they are skipped and say so.
if ! command -v chromium >/dev/null && command -v apt-get >/dev/null && [ "$(id -u)" = 0 ]; then
  echo "== installing Debian's chromium"
  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive \
    apt-get install -y -qq --no-install-recommends chromium fonts-noto-cjk; } >/dev/null 2>&1 ||
    echo "chromium is not to be had: the page's browser tests are skipped"
fi

all=false
if [ "${1:-}" = "--all" ]; then all=true; shift; fi
ruff check .
ruff format --check .
mypy
# Files side by side, one thread each; those of the slow tests that measure time one after another.
workers=$(($(nproc) < 4 ? $(nproc) : 4))
beside=(-n "$workers" --no-loadscope-reorder)
# They are the CPU's: a GPU there is hidden, and has tests of its own (python -m pytest -m gpu).
export CUDA_VISIBLE_DEVICES=
OMP_NUM_THREADS=1 python -m pytest -m "not slow and not gpu" "${beside[@]}" --dist loadfile "$@"
if "$all"; then
  OMP_NUM_THREADS=1 python -m pytest -m "slow and not alone and not gpu" "${beside[@]}" --dist loadgroup "$@"
  python -m pytest -m "slow and alone and not gpu" "$@"
fi
