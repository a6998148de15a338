#!/usr/bin/env bash
# Stops a run after its next checkpoint and waits for that, or deletes the TPU.
#
#   tpu/stop.sh --name=NAME --zone=ZONE
#   tpu/stop.sh --name=NAME --zone=ZONE --delete
#
#   --name, --zone      or NAME, ZONE
#   --project=ID        or PROJECT; otherwise gcloud's own
#   --delete            deletes the TPU at once, with what its disks hold;
#                       a run on it gets no checkpoint, so stop it first
#   --queued            or QUEUED=1; for one created with --queued
#   --dry-run           prints the command and runs nothing
set -euo pipefail
# shellcheck source=settings.sh
. "$(dirname "${BASH_SOURCE[0]}")/settings.sh"

delete=
for flag in "$@"; do
  case $flag in
    --delete) delete=1 ;;
    --queued) QUEUED=1 ;;
    *) shared_flag "$flag" ;;
  esac
done
require NAME ZONE

if [[ $delete && ${QUEUED:-} ]]; then
  cloud queued-resources delete "$NAME" --force --quiet
elif [[ $delete ]]; then
  cloud tpu-vm delete "$NAME" --quiet
else
  cloud tpu-vm ssh "$NAME" --worker=all --command="\
pkill -TERM -F jlora.pid -f jlora.train 2> /dev/null || \
{ echo \"\$(hostname): no run\"; exit 0; }; \
while pgrep -F jlora.pid -f jlora.train > /dev/null; do sleep 1; done"
fi
