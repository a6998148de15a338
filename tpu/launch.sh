#!/usr/bin/env bash
# Starts a run on all workers and leaves it there; again, to continue it.
#
#   tpu/launch.sh --name=NAME --zone=ZONE \
#     --config=experiments/qlora.py --workdir=/mnt/jlora/runs/qlora
#
#   --name, --zone      or NAME, ZONE
#   --project=ID        or PROJECT; otherwise gcloud's own
#   --config=FILE       or CONFIG; a file of the commit that was installed
#   --workdir=DIR       or WORKDIR; one folder that all workers see
#   --config.SECTION.FIELD=VALUE   changes one field, as in jlora.train
#   --dry-run           prints the command and runs nothing
#
# On each worker: ~/jlora.log, which grows, and ~/jlora.pid.
set -euo pipefail
# shellcheck source=settings.sh
. "$(dirname "${BASH_SOURCE[0]}")/settings.sh"

fields=()
for flag in "$@"; do
  case $flag in
    --config=*) CONFIG=${flag#*=} ;;
    --config.*=*) fields+=("$flag") ;;
    --workdir=*) WORKDIR=${flag#*=} ;;
    *) shared_flag "$flag" ;;
  esac
done
require NAME ZONE CONFIG WORKDIR
[[ $WORKDIR == /* ]] ||
  fail "WORKDIR is '$WORKDIR', but must be the absolute path of a folder that all workers see; a gs:// bucket is none (tpu/README.md says what is)"

train=$(quote ../jlora-venv/bin/python -m jlora.train --distributed \
  --config="$CONFIG" --workdir="$WORKDIR" "${fields[@]}")
# A pid that another program has got since then does not count as a run.
cloud tpu-vm ssh "$NAME" --worker=all --command="cd jlora-code || exit 1; \
if pgrep -F ../jlora.pid -f jlora.train > /dev/null 2>&1; then \
echo \"\$(hostname): a run is going on; tpu/stop.sh stops it\" >&2; exit 1; fi; \
nohup $train >> ../jlora.log 2>&1 < /dev/null & echo \$! > ../jlora.pid"
