#!/usr/bin/env bash
# Trains on all hosts of a Cloud TPU slice, from a machine with gcloud:
#
#   TPU=v5litepod-16 launch/tpu_vm.sh my-slice us-central2-b --config=experiments/world.py --workdir=gs://BUCKET/world
#
# Everything after name and zone goes to launch.train; the run folder must be in a bucket, or on storage that all hosts
# share. The script creates the slice if it is not there (a spot slice of type $TPU), copies the repository to each host,
# creates its environment there, and starts the run. Re-running the command resumes the run, and the script does so by
# itself:
#
#   MAX_RESTARTS   starts after the run has saved its state (exit code 75) or its slice was reclaimed, 50 by default
#   MAX_FAILURES   starts after other failures, such as of a host, 10 by default
#
# An invalid command (exit code 2) ends it. It leaves the slice running: delete it when the run is finished.
set -euo pipefail
if [ $# -lt 3 ]; then
  echo "usage: $0 NAME ZONE --config=FILE --workdir=DIR …" >&2
  exit 2
fi
NAME=$1 ZONE=$2
shift 2
STOPPED=75 USER_ERROR=2
RELEASES=https://storage.googleapis.com/jax-releases/libtpu_releases.html

slice() { gcloud compute tpus tpu-vm "$1" "$NAME" --zone="$ZONE" "${@:2}"; }
on_all() { slice ssh --worker=all --command="$1"; }
state() { slice describe --format="value(state)" 2>/dev/null || echo ABSENT; }

# Creates the slice if it is not there or was reclaimed, and prepares its hosts.
prepare() {
  local now
  now=$(state)
  if [ "$now" != READY ]; then
    if [ -z "${TPU:-}" ]; then
      echo "the slice $NAME in $ZONE is $now; create it, or name its type, such as TPU=v5litepod-16" >&2
      exit 2
    fi
    [ "$now" = ABSENT ] || slice delete --quiet || return
    slice create --accelerator-type="$TPU" --version="${TPU_VERSION:-tpu-ubuntu2204-base}" --spot || return
  fi
  gcloud compute tpus tpu-vm scp "$ARCHIVE" "$NAME:mmrf_jax.tgz" --zone="$ZONE" --worker=all || return
  on_all "mkdir -p mmrf_jax && tar -xzf mmrf_jax.tgz -C mmrf_jax && cd mmrf_jax && make .venv/.run \
    && .venv/bin/pip install -q 'jax[tpu]' gcsfs -f $RELEASES"
}

ARCHIVE=$(mktemp --suffix=.tgz)
trap 'rm -f "$ARCHIVE"' EXIT
tar --exclude=.git --exclude=.venv --exclude=runs -czf "$ARCHIVE" .
command="cd mmrf_jax && exec .venv/bin/python -m launch.train --multihost$(printf ' %q' "$@")"
stops=0 failures=0 ready=false
while true; do
  code=0
  if ! $ready; then prepare || code=$?; fi
  if [ "$code" -eq 0 ]; then on_all "$command" || code=$?; fi
  if [ "$code" -eq 0 ] || [ "$code" -eq "$USER_ERROR" ]; then
    exit "$code"
  fi
  ready=true
  [ "$(state)" = READY ] || ready=false
  if [ "$code" -eq "$STOPPED" ] || ! $ready; then
    stops=$((stops + 1))
    [ "$stops" -le "${MAX_RESTARTS:-50}" ] || exit "$code"
    echo "the run was stopped, or its slice reclaimed: starting it again ($stops of ${MAX_RESTARTS:-50})" >&2
  else
    failures=$((failures + 1))
    [ "$failures" -le "${MAX_FAILURES:-10}" ] || exit "$code"
    echo "exit code $code: starting the run again ($failures of ${MAX_FAILURES:-10})" >&2
  fi
  sleep "${RESTART_SECONDS:-30}"
done
