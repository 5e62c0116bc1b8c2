#!/usr/bin/env bash
# One run on the GPUs of a SLURM cluster.
#
#   launch/slurm.sh --config FILE --workdir DIR [any argument of wkd_jax.main]     submits the job
#   launch/slurm.sh --check --config FILE [...]                                    waits and shows what the check says
#
# Run it from the repository's root, which all nodes must see, as well as DIR. The job puts itself back into the queue
# when it was preempted, reached its time limit or lost a process. SBATCH_... variables (partition, account) apply too.
set -euo pipefail

NAME=${NAME:-wkd_jax}                       # of the job, and of its log
NODES=${NODES:-1}                           # nodes
GPUS=${GPUS:-8}                             # GPUs of a node
TASKS=${TASKS:-node}                        # processes: one a "node" (data workers share its cores), or one a "gpu"
CPUS=${CPUS:-64}                            # cores of a node, for decoding
TIME=${TIME:-24:00:00}                      # limit; 120 s before it the run is told to save
CHECK_TIME=${CHECK_TIME:-00:15:00}          # limit of --check
LOGS=${LOGS:-runs/logs}                     # folder of the job's log
COMMAND=${COMMAND:-python -m wkd_jax.main}  # split at spaces; gets the arguments and --distributed
RESTARTS=${RESTARTS:-50}                    # times that the job goes back into the queue, then it gives up
WAIT=${WAIT:-120}                           # seconds that the other tasks have once one has ended
DRY_RUN=${DRY_RUN:-}                        # 1: print what would run

PREEMPTED=75 # what wkd_jax.main ends with when the same command goes on from where it stopped

usage() {
  sed -n '2,/^set -/{/^#/s/^# \{0,1\}//p}' "$0"
  sed -n 's/^\([A-Z_]*\)=${[A-Z_]*:\{0,1\}-\(.*\)} *# \(.*\)/  \1 (\2): \3/p' "$0"
}

run() {
  if [[ -n $DRY_RUN ]]; then echo "$*"; else "$@"; fi
}

case ${1:---help} in -h | --help) usage && exit ;; esac
if [[ $TASKS == gpu ]]; then
  tasks=$GPUS
elif [[ $TASKS == node ]]; then
  tasks=1
else
  echo "error: TASKS=$TASKS: must be node or gpu" >&2
  exit 1
fi
read -ra command <<<"$COMMAND"
shape=("--nodes=$NODES" "--ntasks-per-node=$tasks" "--gpus-per-node=$GPUS" "--cpus-per-task=$((CPUS / tasks))")
# Every task sees all GPUs of its node, and JAX takes those that are its own: by default the one whose number is the
# task's on its node. So a task that has the whole node must name them all.
step=(srun "--gpu-bind=none" "--cpus-per-task=$((CPUS / tasks))" --kill-on-bad-exit=0 "--wait=$WAIT" --label)
if [[ $TASKS == node ]]; then
  JAX_LOCAL_DEVICE_IDS=$(seq -s , 0 $((GPUS - 1)))
  export JAX_LOCAL_DEVICE_IDS
fi

if [[ " $* " == *" --check "* ]]; then
  run srun "--job-name=$NAME-check" "--time=$CHECK_TIME" "${shape[@]}" --gpu-bind=none \
    "${command[@]}" "$@" --distributed
  exit
fi

if [[ -z ${WKD_JAX_JOB:-} ]]; then
  run mkdir -p "$LOGS"
  # TERM goes to the tasks, not to this script, which has to live on to put the job back into the queue.
  WKD_JAX_JOB=yes run sbatch "--job-name=$NAME" "--time=$TIME" "${shape[@]}" --signal=TERM@120 --requeue \
    --open-mode=append "--output=$LOGS/$NAME-%j.log" --export=ALL "$0" "$@"
  exit
fi

# srun ends with the largest code of all tasks, and 75 of those that lost a task hides its error: that task leaves a mark.
mark=$LOGS/$NAME-${SLURM_JOB_ID:-0}.error
run rm -f "$mark"
code=0
run "${step[@]}" bash -c 'mark=$0; code=0; "$@" || code=$?
  if ((code && code != 75 && code <= 128)); then echo "$code" >"$mark"; fi; exit $code' \
  "$mark" "${command[@]}" "$@" --distributed || code=$?
if [[ -e $mark ]]; then code=$(<"$mark"); fi
if ((code == PREEMPTED || code > 128)); then
  if ((${SLURM_RESTART_COUNT:-0} < RESTARTS)); then
    echo "launch: exit code $code; back into the queue" >&2
    run scontrol requeue "$SLURM_JOB_ID"
    exit "$code"
  fi
  echo "launch: RESTARTS=$RESTARTS used up" >&2
fi
exit "$code"
