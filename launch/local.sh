#!/usr/bin/env bash
# Several processes of one run on this host: what a pod does with one process a host, to try out or to use several GPUs.
#
#   launch/local.sh [--check] --config FILE [--workdir DIR] [any argument of wkd_jax.main]
#
# Run it from the repository's root. Exit codes are those of wkd_jax.main; launch/README.md has the whole picture.
set -euo pipefail

PROCESSES=${PROCESSES:-2}                   # how many to start
PLATFORM=${PLATFORM:-cpu}                   # cpu, or cuda
DEVICES=${DEVICES:-1}                       # devices of each: simulated ones (cpu), or GPUs of its own (cuda)
COMMAND=${COMMAND:-python -m wkd_jax.main}  # split at spaces; gets the arguments and --distributed
RESTARTS=${RESTARTS:-10}                    # starts after the first one, then it gives up
SETTLE=${SETTLE:-10}                        # seconds that the others have to end by themselves once one has failed
LINGER=${LINGER:-30}                        # seconds from SIGTERM to SIGKILL for those that did not
GRACE=${GRACE:-120}                         # the same after a signal to this script: the time a checkpoint may take
LOGS=${LOGS:-}                              # folder for one log a process; empty: lines with a prefix, here
PORT=${PORT:-}                              # of the coordinator; empty: a free one, another at each start
DRY_RUN=${DRY_RUN:-}                        # 1: print what would run

PREEMPTED=75 # what wkd_jax.main ends with when the same command goes on from where it stopped

usage() {
  sed -n '2,/^set -/{/^#/s/^# \{0,1\}//p}' "$0"
  sed -n 's/^\([A-Z_]*\)=${[A-Z_]*:\{0,1\}-\(.*\)} *# \(.*\)/  \1 (\2): \3/p' "$0"
}

free_port() {
  local port
  for _ in {1..100}; do
    port=$((20000 + RANDOM % 12000)) # below the range that the system gives to outgoing connections
    if ! (: <"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then
      echo "$port"
      return
    fi
  done
  echo "error: no free port from 20000 to 31999; set PORT" >&2
  return 1
}

# The GPUs of process $1, out of those that this shell may use.
gpus() {
  local all=() chosen=()
  if [[ -n ${CUDA_VISIBLE_DEVICES:-} ]]; then
    IFS=, read -ra all <<<"$CUDA_VISIBLE_DEVICES"
  else
    for ((gpu = 0; gpu < PROCESSES * DEVICES; gpu++)); do all+=("$gpu"); done
  fi
  if ((${#all[@]} < PROCESSES * DEVICES)); then
    echo "error: PROCESSES=$PROCESSES times DEVICES=$DEVICES: CUDA_VISIBLE_DEVICES has ${#all[@]}" >&2
    return 1
  fi
  chosen=("${all[@]:$1*DEVICES:DEVICES}")
  (IFS=, && echo "${chosen[*]}")
}

prefix() {
  local line
  while IFS= read -r line || [[ -n $line ]]; do printf '[%s] %s\n' "$1" "$line"; done
}

# Starts process $1 of the run at port $2; the rest are its arguments. Its id: the last element of `pids`.
start() {
  local index=$1 port=$2 devices ids cores pinned=()
  shift 2
  local settings=("JAX_COORDINATOR_ADDRESS=127.0.0.1:$port" "JAX_NUM_PROCESSES=$PROCESSES" "JAX_PROCESS_ID=$index"
    PYTHONUNBUFFERED=1)
  if [[ $PLATFORM == cpu ]]; then
    settings+=(JAX_PLATFORMS=cpu "JAX_NUM_CPU_DEVICES=$DEVICES")
  else
    devices=$(gpus "$index")
    ids=$(seq -s , 0 $((DEVICES - 1)))
    # The second one because JAX takes one GPU a process where it finds itself inside a SLURM allocation.
    settings+=("CUDA_VISIBLE_DEVICES=$devices" "JAX_LOCAL_DEVICE_IDS=$ids")
    # Each process decodes on its own share of the cores.
    cores=$(($(nproc) / PROCESSES))
    if ((cores)); then pinned=(taskset -c "$((index * cores))-$(((index + 1) * cores - 1))"); fi
  fi
  if [[ -n $DRY_RUN ]]; then
    echo "env ${settings[*]} ${pinned[*]+"${pinned[*]} "}${command[*]} $* --distributed"
  elif [[ -n $LOGS ]]; then
    env "${settings[@]}" ${pinned[@]+"${pinned[@]}"} "${command[@]}" "$@" --distributed >>"$LOGS/process_$index.log" 2>&1 &
    pids+=($!)
  else
    env "${settings[@]}" ${pinned[@]+"${pinned[@]}"} "${command[@]}" "$@" --distributed > >(prefix "$index") 2>&1 &
    pids+=($!)
  fi
}

signal_all() {
  for pid in "${running[@]}"; do kill "-$1" "$pid" 2>/dev/null || true; done
}

# Takes processes that have ended out of `running`. The first failure decides what happens: later ones follow from it.
collect() {
  local left=() pid code decided=$failed$again$killing
  for pid in "${running[@]}"; do
    if kill -0 "$pid" 2>/dev/null; then
      left+=("$pid")
      continue
    fi
    code=0
    wait "$pid" || code=$?
    if ((code)); then echo "launch: process $(index_of "$pid") ended with exit code $code" >&2; fi
    if [[ -n $decided ]] || ((code == 0)); then
      continue
    elif ((code == PREEMPTED || code > 128)); then
      again=${again:-$code}
    else
      failed=${failed:-$code}
    fi
  done
  running=(${left[@]+"${left[@]}"})
}

index_of() {
  local i
  for i in "${!pids[@]}"; do
    if [[ ${pids[i]} == "$1" ]]; then echo "$i"; fi
  done
}

# Waits until no process runs, or `seconds` have passed.
settle() {
  local end=$((SECONDS + $1))
  while ((${#running[@]} && SECONDS < end)); do
    sleep 0.2
    collect
  done
}

# One start of all processes, to its end. Sets `failed` to an error's code, or `again` to one that calls for a restart.
attempt() {
  local port=${PORT:-$(free_port)} index
  pids=() failed="" again="" killing=""
  for ((index = 0; index < PROCESSES; index++)); do start "$index" "$port" "$@"; done
  running=(${pids[@]+"${pids[@]}"})
  while ((${#running[@]})) && [[ -z $failed$again$stopping ]]; do
    sleep 0.2
    collect
  done
  local grace=$GRACE
  if [[ -z $stopping ]]; then
    # Those that notice by themselves say why, save what they can and give a code of their own; the rest wait in vain.
    settle "$SETTLE"
    grace=$LINGER
    killing=yes # what they end with from here on is this script's doing
  fi
  if ((${#running[@]})); then
    signal_all TERM
    settle "$grace"
    signal_all KILL
    settle 10
  fi
}

case ${1:---help} in -h | --help) usage && exit ;; esac
for name in PROCESSES DEVICES; do
  if [[ ! ${!name} =~ ^[1-9][0-9]*$ ]]; then
    echo "error: $name=${!name}: must be a number above 0" >&2
    exit 1
  fi
done
if [[ $PLATFORM != cpu && $PLATFORM != cuda ]]; then
  echo "error: PLATFORM=$PLATFORM: must be cpu or cuda" >&2
  exit 1
fi
read -ra command <<<"$COMMAND"
if [[ -n $LOGS ]]; then mkdir -p "$LOGS"; fi

# SIGINT too is passed on as SIGTERM, on which a run saves and ends: what a script has in the background ignores SIGINT.
stopping=""
trap 'stopping=yes' TERM INT
for ((round = 0; ; round++)); do
  attempt "$@"
  if [[ -n $failed ]]; then exit "$failed"; fi
  if [[ -z $again ]]; then exit 0; fi
  if [[ -n $stopping ]]; then exit $PREEMPTED; fi
  if ((round >= RESTARTS)); then
    echo "launch: RESTARTS=$RESTARTS used up" >&2
    exit "$again"
  fi
  echo "launch: starting again, $((round + 1)) of at most $RESTARTS" >&2
done
