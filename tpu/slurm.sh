#!/usr/bin/env bash
# Submits a run to SLURM, on the GPUs of one node or of several.
#
#   tpu/slurm.sh --nodes=2 --gpus=8 --config=experiments/qlora.py \
#     --workdir=/shared/runs/qlora --time=8:00:00
#
#   --nodes=N           or NODES; default 1
#   --gpus=N            or GPUS; GPUs a node
#   --cpus=N            or CPUS; CPU cores for each GPU, default 8
#   --config=FILE, --workdir=DIR   or CONFIG, WORKDIR; on shared storage
#   --config.SECTION.FIELD=VALUE   changes one field, as in jlora.train
#   --dry-run           prints the command and runs nothing
#   Any other flag goes to sbatch: --partition=gpu --account=mine
#
# Run it where `python -m jlora.train` runs: in the repository, with the
# environment active. The job takes both over.
set -euo pipefail
# shellcheck source=settings.sh
. "$(dirname "${BASH_SOURCE[0]}")/settings.sh"

fields=() options=()
for flag in "$@"; do
  case $flag in
    --nodes=*) NODES=${flag#*=} ;;
    --gpus=*) GPUS=${flag#*=} ;;
    --cpus=*) CPUS=${flag#*=} ;;
    --config=*) CONFIG=${flag#*=} ;;
    --config.*=*) fields+=("$flag") ;;
    --workdir=*) WORKDIR=${flag#*=} ;;
    --dry-run | --help) shared_flag "$flag" ;;
    --*) options+=("$flag") ;;
    *) shared_flag "$flag" ;;
  esac
done
require GPUS CONFIG WORKDIR

# One task a GPU, and each task sees all GPUs of its node: so JAX finds its way
# in SLURM, where task i of a node takes the i-th GPU and no other.
# A task that ends with 75, stopped after a checkpoint, must not end the rest.
srun="srun --cpus-per-task=${CPUS:-8} --gpu-bind=none --kill-on-bad-exit=0 --label"
train=$(quote python -m jlora.train --distributed --config="$CONFIG" \
  --workdir="$WORKDIR" "${fields[@]}")
# Two minutes before the time is over, the run is asked to save and end.
run sbatch --job-name=jlora --nodes="${NODES:-1}" --ntasks-per-node="$GPUS" \
  --gpus-per-node="$GPUS" --cpus-per-task="${CPUS:-8}" --signal=TERM@120 \
  --output=jlora-%j.log "${options[@]}" --wrap="$srun $train"
