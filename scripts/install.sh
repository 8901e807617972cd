#!/usr/bin/env bash
# Make .venv (or use the active environment) and install requirements.txt into it.
# Without a GPU the CPU build of torch is preferred: 200 MB instead of 3 GB.
[ -n "${BASH_VERSION:-}" ] || { echo "error: this script needs bash: bash $0 $*" >&2; exit 2; }
set -euo pipefail
cd "$(dirname "$0")/.."

environment=${VIRTUAL_ENV:-${CONDA_PREFIX:-}}
if [ -z "$environment" ] && [ ! -x .venv/bin/pip ]; then
  if ! command -v python3 >/dev/null || ! python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "error: Python >= 3.11 is needed and python3 is $(python3 --version 2>&1 || true): install a newer one" >&2
    exit 2
  fi
  if ! python3 -c 'import venv, ensurepip' 2>/dev/null; then
    echo "error: python3 has no venv module: apt-get install python3-venv" >&2
    exit 2
  fi
  python3 -m venv .venv
fi
if [ -z "$environment" ]; then
  source .venv/bin/activate
  environment=$VIRTUAL_ENV
fi

# Already installed for this very requirements.txt?
stamp="$environment/.requirements.sha256"
if sha256sum --check --status "$stamp" 2>/dev/null; then exit 0; fi

echo "== installing requirements.txt into $environment"
if ! command -v nvidia-smi >/dev/null && ! python -c 'import torch' 2>/dev/null; then
  python -m pip install --quiet --disable-pip-version-check --retries 1 \
    --extra-index-url https://download.pytorch.org/whl/cpu 'torch==2.13.0+cpu' 2>/dev/null || echo "no CPU build of torch is to be had: the standard build is installed"
fi
python -m pip install --quiet --disable-pip-version-check -r requirements.txt
sha256sum requirements.txt > "$stamp"
