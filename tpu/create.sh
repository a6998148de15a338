#!/usr/bin/env bash
# Creates a TPU VM, or a pod slice, which is several.
#
#   tpu/create.sh --name=NAME --zone=ZONE --accelerator=v5litepod-16
#
#   --name, --zone, --accelerator   or NAME, ZONE, ACCELERATOR
#   --project=ID        or PROJECT; otherwise gcloud's own
#   --runtime=VERSION   or RUNTIME; not needed for v5litepod, v5p and v6e
#   --spot              or SPOT=1; costs less, may be taken away at any time
#   --queued            or QUEUED=1; waits in Google's queue for capacity
#   --dry-run           prints the command and runs nothing
#
# The number in v5litepod-16 and v6e-8 counts chips. In v5p-128 it counts
# TensorCores, of which a chip has two: v5p-128 is 64 chips.
set -euo pipefail
# shellcheck source=settings.sh
. "$(dirname "${BASH_SOURCE[0]}")/settings.sh"

for flag in "$@"; do
  case $flag in
    --accelerator=*) ACCELERATOR=${flag#*=} ;;
    --runtime=*) RUNTIME=${flag#*=} ;;
    --spot) SPOT=1 ;;
    --queued) QUEUED=1 ;;
    *) shared_flag "$flag" ;;
  esac
done
require NAME ZONE ACCELERATOR

if [[ ! ${RUNTIME:-} ]]; then
  # From https://cloud.google.com/tpu/docs/runtimes, the table for JAX.
  case $ACCELERATOR in
    v5litepod-*) RUNTIME=v2-alpha-tpuv5-lite ;;
    v5p-*) RUNTIME=v2-alpha-tpuv5 ;;
    v6e-*) RUNTIME=v2-alpha-tpuv6e ;;
    *) fail "RUNTIME is missing: ACCELERATOR is '$ACCELERATOR', and only v5litepod-N, v5p-N and v6e-N have a known one; give --runtime=... or set RUNTIME" ;;
  esac
fi

if [[ ${QUEUED:-} ]]; then
  cloud queued-resources create "$NAME" --node-id="$NAME" \
    --accelerator-type="$ACCELERATOR" --runtime-version="$RUNTIME" \
    ${SPOT:+--spot}
else
  cloud tpu-vm create "$NAME" --accelerator-type="$ACCELERATOR" \
    --version="$RUNTIME" ${SPOT:+--spot}
fi
