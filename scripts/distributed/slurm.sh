#!/usr/bin/env bash
# A run under SLURM, from the repository's folder; the flags of qlora_finetune.py stand behind it:
#   sbatch --nodes 2 --gpus-per-node 8 scripts/distributed/slurm.sh --model_name_or_path PATH --output_dir RUN
# Two minutes before the time limit the run saves, and the job goes back into the queue: it goes on from there.
# Rows of a step: per_device_train_batch_size x gradient_accumulation_steps x nodes x GPUs of a node.
# It was run with stand-ins for srun and scontrol, as two machines of one CPU process each; never on a cluster.
#SBATCH --job-name=qlora
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:TERM@120
set -euo pipefail

gpus=${SLURM_GPUS_ON_NODE:-${GPUS:?processes on each machine}}
mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
export FIRST=${hosts[0]} NODES=$SLURM_NNODES GPUS=$gpus PORT=$((20000 + SLURM_JOB_ID % 20000))

stopped=
srun --kill-on-bad-exit=1 bash -c 'NODE=$SLURM_NODEID exec bash scripts/distributed/several_nodes.sh "$@"' _ "$@" &
job=$!
trap 'stopped=yes; kill -TERM "$job"' TERM
code=0
wait "$job" || code=$?
if [ -n "$stopped" ]; then
  wait "$job" || true  # it saves and ends; the trap only interrupted the wait before
  scontrol requeue "$SLURM_JOB_ID"
  exit 0
fi
exit "$code"
