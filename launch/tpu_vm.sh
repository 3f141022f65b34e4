#!/usr/bin/env bash
# Trains on all hosts of a Cloud TPU slice, from a machine with gcloud:
#
#   launch/tpu_vm.sh my-slice us-central2-b --config=experiments/world.py --workdir=/mnt/runs/world
#
# Everything after name and zone goes to launch.train; the run folder must be on storage that all hosts share. Copies
# the repository to each host and creates its environment there. Re-running the command resumes the run. If it exits
# with 75 (preempted, state saved), for example because a spot slice was reclaimed, the script restarts it by itself.
set -euo pipefail
if [ $# -lt 3 ]; then
  echo "usage: $0 NAME ZONE --config=FILE --workdir=DIR …" >&2
  exit 2
fi
NAME=$1 ZONE=$2
shift 2
STOPPED=75

on_all() { gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker=all --command="$1"; }

tar --exclude=.git --exclude=.venv --exclude=runs -czf /tmp/mmrf_jax.tgz .
gcloud compute tpus tpu-vm scp /tmp/mmrf_jax.tgz "$NAME:" --zone="$ZONE" --worker=all
on_all "mkdir -p mmrf_jax && tar -xzf mmrf_jax.tgz -C mmrf_jax && cd mmrf_jax && make .venv/.run \
  && .venv/bin/pip install -q 'jax[tpu]' -f https://storage.googleapis.com/jax-releases/libtpu_releases.html"

command="cd mmrf_jax && exec .venv/bin/python -m launch.train --multihost$(printf ' %q' "$@")"
while true; do
  code=0
  on_all "$command" || code=$?
  [ "$code" -eq "$STOPPED" ] || exit "$code"
  echo "the run was told to stop and has saved its state; starting it again" >&2
  sleep "${RESTART_SECONDS:-30}"
done
