#!/usr/bin/env bash
# What job.sbatch does: run multinode.sh on every node of the job, have the run save before its time is over, and ask
# Slurm for another turn.
#   bash launch/cluster/job.sh BATCH_FILE ENTRY CONFIG [options]
# The job is requeued, at most MAX_REQUEUES (100) times, when the run is not at its last step and either the job was
# warned (--signal=B:USR1@…) or the ranks left after a checkpoint, as a pre-emption with a grace time tells them to.
# A run that fails is not, and the job's exit code is srun's, the highest of all nodes: of those that it had to end, too.
# Nor is a job that scancel ends. When a node fails, Slurm itself requeues (--requeue).
set -euo pipefail

batch_file=$1
shift
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
multinode=$root/launch/cluster/multinode.sh
# shellcheck source=launch/cluster/node.sh
. "$root/launch/cluster/node.sh"

header() {  # OPTION: its value in the batch file
    sed -n "s/^#SBATCH --$1=\([^ ]*\).*/\1/p" "$batch_file"
}

say() {
    echo "job ${SLURM_JOB_ID:-}: $*" >&2
}

dry_run=${DRY_RUN:-}
[ "$dry_run" != 0 ] || dry_run=
options=()
for word in "$@"; do
    if [ "$word" = --dry-run ]; then dry_run=1; else options+=("$word"); fi
done
set -- "${options[@]}"
if [ "${1:-}" = -h ] || [ "${1:-}" = --help ] || [ $# -eq 0 ]; then
    echo "sbatch [--nodes=N] $batch_file ENTRY CONFIG [options]; with bash instead and --dry-run it shows what it would run"
    [ $# -gt 0 ] && exit 0
    exit 2
fi
if [ -z "${SLURM_JOB_ID:-}" ]; then
    [ "$dry_run" ] || { echo "error: submit this with sbatch, or add --dry-run to see what it would run" >&2; exit 2; }
    export NNODES=${NNODES:-$(header nodes)} NPROC=${NPROC:-$(header gpus-per-node)}
    exec bash "$multinode" "$@" --dry-run
fi

export PYTHON=${PYTHON:-python}
mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
export NNODES=${#hosts[@]} MASTER_ADDR=${hosts[0]} MASTER_PORT=${MASTER_PORT:-$((10000 + SLURM_JOB_ID % 20000))}
export NPROC=${NPROC:-${SLURM_GPUS_ON_NODE:-}} RDZV_ID=$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}
if [ "$dry_run" ]; then
    exec bash "$multinode" "$@" --dry-run
fi
if ! command -v "$PYTHON" >/dev/null; then
    echo "error: there is no $PYTHON; activate your environment before sbatch, or set PYTHON" >&2
    exit 2
fi
node_check_words "$@"
node_read_config "${@:2}"

finished() {  # whether the run has come to its last step
    "$PYTHON" -c '
import json, sys
try:
    with open(sys.argv[1]) as file:
        sys.exit(json.load(file)["steps"] < int(sys.argv[2] or 0))
except FileNotFoundError:
    sys.exit(1)' "$output/summary.json" "$steps"
}

requeue() {
    if [ "${SLURM_RESTART_COUNT:-0}" -ge "${MAX_REQUEUES:-100}" ]; then
        say "not at its last step, but requeued MAX_REQUEUES=${MAX_REQUEUES:-100} times already; submit again to go on"
        return 1
    fi
    say "not at its last step: requeued, to go on from the newest checkpoint"
    scontrol requeue "$SLURM_JOB_ID" || { say "scontrol requeue failed; submit the job again to go on"; return 1; }
}

warned="" ending="" code=0 seconds=0
trap 'warned=1' USR1
trap 'ending=1' TERM
# A step has one core a task unless it is told otherwise; what sbatch was told does not count.
# shellcheck disable=SC2016  # expanded on the nodes
srun --nodes="$NNODES" --ntasks="$NNODES" --ntasks-per-node=1 --kill-on-bad-exit=1 \
    ${SLURM_CPUS_PER_TASK:+"--cpus-per-task=$SLURM_CPUS_PER_TASK"} \
    bash -c 'NODE_RANK=$SLURM_NODEID exec bash "$0" "$@"' "$multinode" "$@" &
step=$!
while kill -0 "$step" 2>/dev/null; do
    # srun passes the signal on to the tasks; again and again, for one that is still starting would miss it.
    if [ "$warned$ending" ]; then
        [ $((seconds % 10)) -ne 0 ] || kill -USR1 "$step" 2>/dev/null || true
        seconds=$((seconds + 1))
    fi
    # The time is over with the checkpoint not written: after this signal there are seconds left.
    if [ "$warned" ] && [ "$ending" ]; then
        requeue || true
        wait "$step" || exit $?
        exit
    fi
    sleep 1 &
    pause=$!
    wait "$pause" || true
done
wait "$step" || code=$?
if finished; then
    exit "$code"
elif [ "$ending" ] && [ -z "$warned" ]; then
    say "ended from outside: not requeued; submit it again to go on"
elif [ "$warned" ] || [ "$code" -eq 0 ]; then
    # So that jobs which wait for this one to succeed do not start.
    requeue || { [ "$code" -ne 0 ] || code=1; }
fi
exit "$code"
