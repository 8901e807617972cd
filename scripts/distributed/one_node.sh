#!/usr/bin/env bash
# A run on the GPUs of this machine; the flags of qlora_finetune.py stand behind it.
#   GPUS=4 bash scripts/distributed/one_node.sh --model_name_or_path PATH_OR_NAME --dataset_name YOUR.jsonl
#   GPUS            processes, one a GPU; all GPUs where it is left out
#   a copy each     as above: the base fits on one GPU
#   a share each    with --shard_layers behind it: the base fits on all of them together
# Rows of a step: per_device_train_batch_size x gradient_accumulation_steps x GPUS; the run prints them.
# It was run with two CPU processes (GPUS=2 ... --use_cpu) by tests/test_distributed_scripts.py.
[ -n "${BASH_VERSION:-}" ] || { echo "error: this script needs bash: bash $0 $*" >&2; exit 2; }
set -euo pipefail
repo=$(cd "$(dirname "$0")/../.." && pwd)  # paths are relative to where this is called from

gpus=${GPUS:-$(nvidia-smi -L | wc -l)}
exec torchrun --standalone --nproc_per_node "$gpus" "$repo/qlora_finetune.py" "$@"
