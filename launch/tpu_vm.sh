#!/usr/bin/env bash
# One run on Cloud TPU VMs: a slice, or several joined over the data-center network, as one queued resource.
#
#   launch/tpu_vm.sh create                     asks for the machines and waits until they are there
#   launch/tpu_vm.sh setup                      copies this checkout to every worker, installs it, mounts the storage
#   launch/tpu_vm.sh check --config FILE [...]  everything but the training
#   launch/tpu_vm.sh run --config FILE --workdir /mnt/runs/NAME [...]
#                                               starts, watches to the end, brings lost machines back
#   launch/tpu_vm.sh resume [same arguments]    the same from a new shell: goes on watching, or starts what does not run
#   launch/tpu_vm.sh logs | status | stop | delete
#
# Run it from the repository's root. `run` may be interrupted: the training goes on without it, `resume` takes over.
set -euo pipefail

NAME=${NAME:-wkd-jax}                       # of the queued resource and its nodes
PROJECT=${PROJECT:-}                        # empty: gcloud's
ZONE=${ZONE:-us-central1-a}                 # of the machines; the storage belongs into the same region
ACCELERATOR=${ACCELERATOR:-v5litepod-64}    # type and size of a slice
RUNTIME=${RUNTIME:-v2-alpha-tpuv5-lite}     # its software version: v2-alpha-tpuv5 for v5p, v2-alpha-tpuv6e for v6e
SLICES=${SLICES:-1}                         # slices of one run
SPOT=${SPOT-1}                              # 1: spot machines, which may be taken away; empty: on demand
BUCKET=${BUCKET:-}                          # for /mnt/runs: a bucket with a hierarchical namespace, through gcsfuse
NFS=${NFS:-}                                # or host:/share of a file server. One of the two
PYTHON=${PYTHON:-3.12}                      # the machines' own may be older than 3.11
COMMAND=${COMMAND:-python -m wkd_jax.main}  # gets the arguments and --distributed
RESTARTS=${RESTARTS:-50}                    # starts after the first one, then it gives up
GRACE=${GRACE:-120}                         # seconds from SIGTERM to SIGKILL of `stop`: the time a checkpoint may take
POLL=${POLL:-60}                            # seconds between looks at the machines
WORKER=${WORKER:-0}                         # whose log to show; process 0 alone shows progress
DRY_RUN=${DRY_RUN:-}                        # 1: print what would run

PREEMPTED=75 # what wkd_jax.main ends with when the same command goes on from where it stopped

usage() {
  sed -n '2,/^set -/{/^#/s/^# \{0,1\}//p}' "$0"
  sed -n 's/^\([A-Z_]*\)=${[A-Z_]*:\{0,1\}-\(.*\)} *# \(.*\)/  \1 (\2): \3/p' "$0"
}

run() {
  if [[ -n $DRY_RUN ]]; then echo "$*"; else "$@"; fi
}

resource() {
  local verb=$1
  shift
  run gcloud compute tpus queued-resources "$verb" "$@" "--zone=$ZONE" ${project[@]+"${project[@]}"} --quiet
}

everywhere() { resource ssh "$NAME" --node=all --worker=all "--command=$1"; }

# ACTIVE and so on; MISSING if there is none; UNKNOWN if Google cannot be asked, which is no reason to delete anything.
state() {
  local said
  if [[ -n $DRY_RUN ]]; then
    echo ACTIVE
  elif said=$(gcloud compute tpus queued-resources describe "$NAME" "--zone=$ZONE" ${project[@]+"${project[@]}"} \
    "--format=value(state.state)" 2>&1); then
    echo "$said"
  elif [[ $said == *NOT_FOUND* || $said == *"not found"* ]]; then
    echo MISSING
  else
    echo "launch: $said" >&2
    echo UNKNOWN
  fi
}

# Whether the machines are gone for good.
gone() { [[ $(state) =~ ^(MISSING|FAILED|SUSPENDED)$ ]]; }

create() {
  local nodes=("--node-id=$NAME") spot=()
  if ((SLICES > 1)); then nodes=("--node-count=$SLICES" "--node-prefix=$NAME"); fi
  if [[ -n $SPOT ]]; then spot=(--spot); fi
  resource create "$NAME" "--accelerator-type=$ACCELERATOR" "--runtime-version=$RUNTIME" "${nodes[@]}" \
    ${spot[@]+"${spot[@]}"} --scopes=https://www.googleapis.com/auth/cloud-platform
  local now
  while now=$(state) && [[ $now != ACTIVE ]]; do
    echo "launch: $NAME is $now" >&2
    if [[ $now == FAILED ]]; then
      echo "error: $NAME could not be made; launch/tpu_vm.sh delete, then another ZONE or ACCELERATOR" >&2
      return 1
    fi
    sleep "$POLL"
  done
}

setup() {
  local mount archive
  if [[ -n $BUCKET ]]; then
    # Checkpoints become valid by renaming their folder, which in a flat bucket moves file by file, up to a limit.
    mount="command -v gcsfuse >/dev/null || {
      key=/usr/share/keyrings/cloud.google.asc apt=https://packages.cloud.google.com/apt
      echo \"deb [signed-by=\$key] \$apt gcsfuse-\$(lsb_release -cs) main\" |
        sudo tee /etc/apt/sources.list.d/gcsfuse.list
      curl -fsSL \$apt/doc/apt-key.gpg | sudo tee \$key >/dev/null
      sudo apt-get -qq update && sudo apt-get -qq install -y gcsfuse; }
      mountpoint -q /mnt/runs || gcsfuse --implicit-dirs --rename-dir-limit=100000 $BUCKET /mnt/runs"
  elif [[ -n $NFS ]]; then
    mount="sudo apt-get -qq install -y nfs-common; mountpoint -q /mnt/runs || sudo mount -t nfs $NFS /mnt/runs"
  else
    echo "error: neither BUCKET nor NFS is set: all workers must see one work directory, under /mnt/runs" >&2
    return 1
  fi
  archive=$(mktemp)
  run tar --exclude=.git --exclude=runs --exclude='.*cache' --exclude=.venv -czf "$archive" .
  resource scp "$archive" "$NAME:wkd_jax.tar.gz" --node=all --worker=all
  rm -f "$archive"
  everywhere "set -e; sudo mkdir -p /mnt/runs; sudo chown \$USER /mnt/runs
    $mount
    mkdir -p wkd_jax; tar -xzf wkd_jax.tar.gz -C wkd_jax
    python3 -m pip install --quiet --user uv
    test -d venv || ~/.local/bin/uv venv --quiet --python $PYTHON venv
    ~/.local/bin/uv pip install --quiet --python venv 'jax[tpu]' -r wkd_jax/requirements.txt"
}

# The training command with the arguments as given, in the words of a shell.
training() {
  printf '%s ' "$COMMAND"
  printf '%q ' "$@"
  printf -- '--distributed'
}

# On each worker a loop starts the training again where that helps. It does not need this machine, or its connection.
# A file says how it ended; it is gone while it runs. `flock`: a second `run` leaves a loop alone that is there already.
begin() {
  local loop
  loop="cd ~/wkd_jax; . ~/venv/bin/activate
    for round in \$(seq 0 $RESTARTS); do
      $(training "$@") & echo \$! >~/pid
      code=0; wait \$! || code=\$?
      echo \"launch: exit code \$code\"
      [ -e ~/stop ] || { [ \$code -ne $PREEMPTED ] && [ \$code -le 128 ]; } && break
      sleep 5
    done
    echo \$code >~/exit_code"
  loop=$(printf '%q' "$loop")
  everywhere "rm -f ~/stop ~/exit_code; nohup setsid flock -n ~/lock bash -c $loop >>~/train.log 2>&1 </dev/null &"
}

# A word a worker: the exit code, still-running, or lost (a machine that started anew). Fails if one cannot be reached.
codes() {
  everywhere "if flock -n ~/lock true; then cat ~/exit_code 2>/dev/null || echo lost; else echo still-running; fi" \
    2>/dev/null
}

# Follows the run to its end and brings machines back that were taken away. Its exit code is the training's.
watch() {
  local found failures=0
  while [[ -z $DRY_RUN ]]; do
    sleep "$POLL"
    if [[ $(state) == ACTIVE ]] && found=$(codes); then
      failures=0
      if [[ $found == *lost* ]]; then
        echo "launch: a machine started anew" >&2
        setup
        begin "$@"
      elif [[ $found != *still-running* ]]; then
        found=$(grep -E '^[0-9]+$' <<<"$found" | sort -n | uniq) || true
        if [[ $found == 0 ]]; then return 0; fi
        # An error of one worker decides over the others' "a process was lost".
        found=$(grep -vxE "0|$PREEMPTED" <<<"$found" | head -1 || true)
        echo "error: the run ended with exit code ${found:-$PREEMPTED}; see launch/tpu_vm.sh logs" >&2
        return "${found:-$PREEMPTED}"
      fi
    elif gone && ((++failures >= 3)); then # three times in a row
      echo "launch: machines lost; asking for new ones" >&2
      delete || true
      create
      setup
      begin "$@"
      failures=0
    fi
  done
}

delete() { resource delete "$NAME" --force; }

verb=${1:---help}
case $verb in -h | --help) usage && exit ;; esac
shift
project=()
if [[ -n $PROJECT ]]; then project=("--project=$PROJECT"); fi
if [[ $* == *--check* && $verb == run ]]; then verb=check; fi
case $verb in
  create) create ;;
  setup) setup ;;
  check) everywhere "cd ~/wkd_jax; . ~/venv/bin/activate; $(training --check "$@")" ;;
  run | resume)
    if [[ $verb == resume ]] && gone; then
      delete || true
      create
      setup
    fi
    begin "$@"
    watch "$@"
    ;;
  logs) resource ssh "$NAME" "--worker=$WORKER" "--command=tail -n 200 -F train.log" ;;
  status) state && codes ;;
  stop) # The runs save and end with 75; the stop file keeps the loops from starting them again.
    everywhere "touch ~/stop; pid=\$(cat ~/pid); kill -TERM \$pid 2>/dev/null
      for i in \$(seq $GRACE); do kill -0 \$pid 2>/dev/null || exit 0; sleep 1; done; kill -KILL \$pid"
    ;;
  delete) delete ;;
  *)
    echo "error: $verb: must be create, setup, check, run, resume, logs, status, stop or delete" >&2
    exit 1
    ;;
esac
