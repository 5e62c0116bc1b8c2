#!/usr/bin/env bash
# One run on TPU slices of a GKE cluster, through xpk (github.com/AI-Hypercomputer/xpk).
#
#   launch/gke.sh create --config FILE --workdir /mnt/runs/NAME [any argument of wkd_jax.main]
#   launch/gke.sh check --config FILE [...]     the same with --check: a workload NAME-check that trains nothing
#   launch/gke.sh logs | status | delete
#
# Run it from the repository's root: xpk puts that folder on top of IMAGE. The same `create` continues a run.
set -euo pipefail

NAME=${NAME:-wkd-jax}              # of the workload: small letters, digits, -
CLUSTER=${CLUSTER:-}               # of `xpk cluster create`
PROJECT=${PROJECT:-}               # empty: gcloud's
ZONE=${ZONE:-}                     # empty: gcloud's
TPU=${TPU:-v5litepod-64}           # slice
SLICES=${SLICES:-1}                # slices
SPOT=${SPOT:-}                     # 1: spot machines, where the cluster provisions on demand
IMAGE=${IMAGE:-}                   # base image with Python 3.11 or newer, jax[tpu] and requirements.txt installed
RESTARTS=${RESTARTS:-50}           # of the whole job set, on exit code 75 and on lost machines
GRACE=${GRACE:-120}                # seconds from SIGTERM to SIGKILL: the time a checkpoint may take
COMMAND=${COMMAND:-python -m wkd_jax.main}
DRY_RUN=${DRY_RUN:-}               # 1: print what would run

PREEMPTED=75 # what wkd_jax.main ends with when the same command goes on from where it stopped

usage() {
  sed -n '2,/^set -/{/^#/s/^# \{0,1\}//p}' "$0"
  sed -n 's/^\([A-Z_]*\)=${[A-Z_]*:\{0,1\}-\(.*\)} *# \(.*\)/  \1 (\2): \3/p' "$0"
}

run() {
  if [[ -n $DRY_RUN ]]; then echo "$*"; else "$@"; fi
}

need() {
  if [[ -z ${!1} ]]; then
    echo "error: $1 is not set: $2" >&2
    exit 1
  fi
}

where=()
if [[ -n $PROJECT ]]; then where+=("--project=$PROJECT"); fi
if [[ -n $ZONE ]]; then where+=("--zone=$ZONE"); fi

# Creates the workload $1; the rest are arguments of wkd_jax.main.
create() {
  local workload=$1 restarts=$RESTARTS line spot=()
  shift
  need IMAGE "an image with Python 3.11 or newer, jax[tpu] and requirements.txt installed"
  if [[ -n $SPOT ]]; then spot=(--spot); fi
  if [[ " $* " == *" --check "* ]]; then restarts=0; fi
  # exec: the signal that announces the end must reach Python, not a shell around it.
  line="exec $COMMAND $(printf '%q ' "$@")--distributed"
  # xpk restarts on a lost machine and on death by a signal by itself, and on 75 because it is told to.
  run xpk workload create "--cluster=$CLUSTER" "--workload=$workload" "--tpu-type=$TPU" "--num-slices=$SLICES" \
    "--base-docker-image=$IMAGE" "--max-restarts=$restarts" "--restart-on-exit-codes=$PREEMPTED" \
    "--termination-grace-period-seconds=$GRACE" ${spot[@]+"${spot[@]}"} ${where[@]+"${where[@]}"} "--command=$line"
}

verb=${1:---help}
case $verb in -h | --help) usage && exit ;; esac
shift
need CLUSTER "the cluster's name"
case $verb in
  create) create "$NAME" "$@" ;;
  check) create "$NAME-check" --check "$@" ;;
  # Process 0 alone shows progress; a job set numbers its pods from 0.
  logs)
    run kubectl logs --follow --tail=200 \
      -l "jobset.sigs.k8s.io/jobset-name=$NAME,batch.kubernetes.io/job-completion-index=0"
    ;;
  status) run xpk workload list "--cluster=$CLUSTER" "--filter-by-job=$NAME" ${where[@]+"${where[@]}"} ;;
  delete) run xpk workload delete "--cluster=$CLUSTER" "--workload=$NAME" ${where[@]+"${where[@]}"} ;;
  *)
    echo "error: $verb: must be create, check, logs, status or delete" >&2
    exit 1
    ;;
esac
