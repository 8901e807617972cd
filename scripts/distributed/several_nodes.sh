#!/usr/bin/env bash
# A run on several machines: the same command on each of them, NODE counted from 0.
#   NODES=2 NODE=0 FIRST=10.0.0.1 GPUS=8 bash scripts/distributed/several_nodes.sh --model_name_or_path ...
#   NODES, NODE     how many machines, and which one this is
#   FIRST           an address of machine 0 that the others reach; PORT (29500) must be open on it
#   GPUS            processes on this machine, one a GPU; all GPUs where it is left out
# Base, data and --output_dir lie where all machines see them: each process adds a file to a checkpoint.
# Rows of a step: per_device_train_batch_size x gradient_accumulation_steps x NODES x GPUS.
# It was run as two machines of one CPU process each by tests/test_distributed_scripts.py.
[ -n "${BASH_VERSION:-}" ] || { echo "error: this script needs bash: bash $0 $*" >&2; exit 2; }
set -euo pipefail
repo=$(cd "$(dirname "$0")/../.." && pwd)  # paths are relative to where this is called from

gpus=${GPUS:-$(nvidia-smi -L | wc -l)}
nodes=(--nnodes "${NODES:?how many machines}" --node_rank "${NODE:?which one this is, from 0}")
meeting=(--master_addr "${FIRST:?an address of machine 0}" --master_port "${PORT:-29500}")
exec torchrun "${nodes[@]}" "${meeting[@]}" --nproc_per_node "$gpus" "$repo/qlora_finetune.py" "$@"
