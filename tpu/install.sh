#!/usr/bin/env bash
# Installs a commit of this repository on all workers; again, to change it.
#
#   tpu/install.sh --name=NAME --zone=ZONE
#
#   --name, --zone      or NAME, ZONE
#   --project=ID        or PROJECT; otherwise gcloud's own
#   --commit=REVISION   or COMMIT; default HEAD. What is not committed stays here
#   --dry-run           prints the commands and runs nothing
#
# On each worker: ~/jlora-code, replaced, and the environment ~/jlora-venv.
set -euo pipefail
# shellcheck source=settings.sh
. "$(dirname "${BASH_SOURCE[0]}")/settings.sh"

for flag in "$@"; do
  case $flag in
    --commit=*) COMMIT=${flag#*=} ;;
    *) shared_flag "$flag" ;;
  esac
done
require NAME ZONE

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
archive=${TMPDIR:-/tmp}/jlora-code.tar.gz
run git -C "$root" archive --format=tar.gz --prefix=jlora-code/ \
  --output="$archive" "${COMMIT:-HEAD}"
cloud tpu-vm scp "$archive" "$NAME:" --worker=all
# The VMs' Ubuntu 22.04 has Python 3.10, which JAX no longer takes; uv fetches
# another one.
cloud tpu-vm ssh "$NAME" --worker=all --command="set -e; \
rm -rf jlora-code; tar -xzf jlora-code.tar.gz; \
curl -LsSf https://astral.sh/uv/install.sh | sh; \
~/.local/bin/uv venv --allow-existing --seed --python=3.11 jlora-venv; \
jlora-venv/bin/pip install --quiet --editable \"./jlora-code[tpu]\""
