# Sourced by the scripts here: settings, and commands that are shown or run.
# shellcheck shell=bash disable=SC2034 # the scripts use what is set here

DRY_RUN=

# fail MESSAGE: the input is wrong.
fail() {
  echo "${0##*/}: $1" >&2
  exit 2
}

# shared_flag FLAG: reads a flag that all scripts have, and refuses any other.
shared_flag() {
  case $1 in
    --name=*) NAME=${1#*=} ;;
    --zone=*) ZONE=${1#*=} ;;
    --project=*) PROJECT=${1#*=} ;;
    --dry-run) DRY_RUN=1 ;;
    --help)
      awk 'NR > 1 { if (!sub(/^# ?/, "")) exit; print }' "$0" # its first comment
      exit
      ;;
    *) fail "unknown argument '$1'; --help lists the flags, as --flag=value" ;;
  esac
}

# require NAME...: fails unless each of these settings has a value.
require() {
  local name
  for name in "$@"; do
    [[ ${!name:-} ]] || fail "$name is missing; give --${name,,}=... or set $name"
  done
}

# quote WORD...: prints one line that a shell reads as these words.
quote() {
  local word line=()
  for word in "$@"; do
    [[ $word =~ ^[a-zA-Z0-9_@%+=:,./-]+$ ]] || word=${word@Q}
    line+=("$word")
  done
  printf '%s\n' "${line[*]}"
}

# run WORD...: runs a command; in a dry run, prints it.
run() {
  if [[ $DRY_RUN ]]; then quote "$@"; else "$@"; fi
}

# cloud WORD...: gcloud compute tpus WORD..., in the zone and the project.
cloud() {
  run gcloud compute tpus "$@" --zone="$ZONE" ${PROJECT:+"--project=$PROJECT"}
}
