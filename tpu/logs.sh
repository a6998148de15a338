#!/usr/bin/env bash
# Follows the log of a worker, until Ctrl-C; the run goes on.
#
#   tpu/logs.sh --name=NAME --zone=ZONE
#
#   --name, --zone      or NAME, ZONE
#   --project=ID        or PROJECT; otherwise gcloud's own
#   --worker=N          or WORKER; default 0, or all
#   --dry-run           prints the command and runs nothing
set -euo pipefail
# shellcheck source=settings.sh
. "$(dirname "${BASH_SOURCE[0]}")/settings.sh"

for flag in "$@"; do
  case $flag in
    --worker=*) WORKER=${flag#*=} ;;
    *) shared_flag "$flag" ;;
  esac
done
require NAME ZONE

cloud tpu-vm ssh "$NAME" --worker="${WORKER:-0}" \
  --command='tail -n 100 -F jlora.log'
