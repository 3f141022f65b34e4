# Sourced by the batch scripts of this folder: starts a command with srun, and queues the job again where that helps.
#
#   MAX_RESTARTS   starts of a job that saves its state each time (exit code 75), 200 by default
#   MAX_FAILURES   the same for all other failures, such as of a node, 10 by default
# shellcheck shell=bash

STOPPED=75     # preempted, state saved
USER_ERROR=2   # invalid command: do not restart

# Runs `srun OPTIONS COMMAND`, and ends the script with its exit code.
run_and_requeue() {
  local code=0 restarts=${SLURM_RESTART_COUNT:-0} most=${MAX_FAILURES:-10}
  # A preempting scheduler sends SIGTERM to this shell too, which must outlive the command to queue the job again.
  trap : TERM
  # One compile cache for all restarts.
  export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$PWD/.cache/xla}
  srun "$@" || code=$?
  if [ "$code" -eq 0 ] || [ "$code" -eq "$USER_ERROR" ]; then
    exit "$code"
  fi
  [ "$code" -eq "$STOPPED" ] && most=${MAX_RESTARTS:-200}
  if [ "$restarts" -lt "$most" ]; then
    echo "exit code $code: queued again (restart $((restarts + 1)) of at most $most)"
    scontrol requeue "$SLURM_JOB_ID"
  else
    echo "exit code $code after $restarts restarts: not queued again; the same sbatch command resumes" >&2
  fi
  exit "$code"
}
