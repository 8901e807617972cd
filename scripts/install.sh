#!/usr/bin/env bash
# Install requirements.txt into the active venv or conda environment; where none is, or conda's base, into .venv.
# Without a GPU the CPU build of torch is preferred: 200 MB instead of 3 GB.
#   bash scripts/install.sh
# quickstart.sh and test.sh source it, and then call what they need from that environment.
[ -n "${BASH_VERSION:-}" ] || { echo "error: this script needs bash: bash $0 $*" >&2; exit 2; }
set -euo pipefail
source "$(dirname "$0")/usage.sh" "$@"
cd "$(dirname "$0")/.."

environment=${VIRTUAL_ENV:-${CONDA_PREFIX:-}}
if [ -z "${VIRTUAL_ENV:-}" ] && [ "${CONDA_DEFAULT_ENV:-}" = base ]; then  # conda itself runs on what is in there
  environment=
fi
python=$environment/bin/python cure="install a newer one"
if [ -z "$environment" ]; then
  environment=$PWD/.venv
  python=python3
  [ ! -x .venv/bin/pip ] || python=.venv/bin/python cure="remove .venv, and python3 makes it anew"
fi
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
  echo "error: Python >= 3.11 is needed and $python is $("$python" --version 2>/dev/null || echo "not there"):" \
    "$cure, or activate an environment that has it (conda create -n qlora python=3.12)" >&2
  exit 2
fi
if [ "$python" = python3 ]; then
  if ! python3 -c 'import venv, ensurepip' 2>/dev/null; then
    echo "error: python3 has no venv module: apt-get install python3-venv" >&2
    exit 2
  fi
  python3 -m venv .venv
fi
export PATH="$environment/bin:$PATH"

# Already installed for this very requirements.txt?
stamp="$environment/.requirements.sha256"
if ! sha256sum --check --status "$stamp" 2>/dev/null; then
  if ! python -m pip --version >/dev/null 2>&1; then
    echo "error: $environment has no pip: put it there with $environment/bin/python -m ensurepip" >&2
    exit 2
  fi
  echo "== installing requirements.txt into $environment"
  if ! command -v nvidia-smi >/dev/null && ! python -c 'import torch' 2>/dev/null; then
    python -m pip install --quiet --disable-pip-version-check --retries 1 \
      --extra-index-url https://download.pytorch.org/whl/cpu 'torch==2.13.0+cpu' 2>/dev/null || echo "no CPU build of torch is to be had: the standard build is installed"
  fi
  python -m pip install --quiet --disable-pip-version-check -r requirements.txt
  sha256sum requirements.txt > "$stamp"
fi
