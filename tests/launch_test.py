"""launch/: the restarts of local.sh with a small script in the training's place; what the other scripts would run."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest

LAUNCH = pathlib.Path(__file__).parent.parent / "launch"
SCRIPTS = ("local.sh", "slurm.sh", "gke.sh", "tpu_vm.sh")

# Notes what it was started with, then follows the plan: one instruction a start and process.
WORKER = """
import json, os, pathlib, signal, sys, time
folder, index = pathlib.Path(sys.argv[1]), os.environ["JAX_PROCESS_ID"]
start = len(list(folder.glob(f"start_*_{index}.json")))
names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID", "JAX_PLATFORMS", "JAX_NUM_CPU_DEVICES",
         "CUDA_VISIBLE_DEVICES", "JAX_LOCAL_DEVICE_IDS")
note = {"pid": os.getpid(), "arguments": sys.argv[2:], **{name: os.environ.get(name) for name in names}}
plan = json.loads((folder / "plan.json").read_text())
plan = (plan[start] if start < len(plan) else plan[-1])[int(index)]
def stop(code):
    (folder / f"stopped_{start}_{index}").touch()
    sys.exit(code)
if plan == "saves":
    signal.signal(signal.SIGTERM, lambda *_: stop(75))
elif plan == "hangs":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
temporary = folder / f"temporary_{index}"
temporary.write_text(json.dumps(note))
temporary.rename(folder / f"start_{start}_{index}.json")
print("line", index, flush=True)
if plan == "dies":
    os.kill(os.getpid(), signal.SIGKILL)
elif isinstance(plan, int):
    sys.exit(plan)
time.sleep(60)
"""


class Launch:
    """local.sh with the worker above. `plan[start][process]`: an exit code, "saves", "hangs" or "dies"."""

    def __init__(self, folder, plan, **variables):
        self.folder = folder
        (folder / "worker.py").write_text(WORKER)
        (folder / "plan.json").write_text(json.dumps(plan))
        settings = {"PROCESSES": "2", "SETTLE": "1", "LINGER": "1", "RESTARTS": "2"} | variables
        settings["COMMAND"] = f"{sys.executable} -S {folder / 'worker.py'} {folder}"
        # A shell cannot trap what was ignored when it started, as SIGINT is in the background of a script.
        self.process = subprocess.Popen(
            ["env", "--default-signal=INT", LAUNCH / "local.sh", "--config", "a b"],
            env=os.environ | settings,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def wait(self):
        self.output, _ = self.process.communicate(timeout=30)
        return self.process.returncode

    def started(self, start, index):
        path = self.folder / f"start_{start}_{index}.json"
        for _ in range(300):
            if path.exists():
                return json.loads(path.read_text())
            time.sleep(0.05)
        raise TimeoutError(path)

    @property
    def starts(self):
        return len(list(self.folder.glob("start_*_0.json")))


def test_each_process_gets_its_place(tmp_path):
    launch = Launch(tmp_path, [[0, 0, 0]], PROCESSES="3", DEVICES="4")
    assert launch.wait() == 0
    notes = [launch.started(0, index) for index in range(3)]
    assert [note["JAX_PROCESS_ID"] for note in notes] == ["0", "1", "2"]
    assert len({note["JAX_COORDINATOR_ADDRESS"] for note in notes}) == 1
    assert notes[0]["JAX_COORDINATOR_ADDRESS"].startswith("127.0.0.1:")
    assert {(n["JAX_NUM_PROCESSES"], n["JAX_PLATFORMS"], n["JAX_NUM_CPU_DEVICES"]) for n in notes} == {
        ("3", "cpu", "4")
    }
    assert all(note["arguments"] == ["--config", "a b", "--distributed"] for note in notes)
    assert sorted(launch.output.split("\n"))[-3:] == [f"[{index}] line {index}" for index in range(3)]


def test_gpus_are_split_and_output_goes_to_files(tmp_path):
    logs = tmp_path / "logs"
    variables = {"PLATFORM": "cuda", "DEVICES": "2", "CUDA_VISIBLE_DEVICES": "7,6,5,4", "LOGS": str(logs)}
    launch = Launch(tmp_path, [[0, 0]], **variables)
    assert launch.wait() == 0
    assert [launch.started(0, index)["CUDA_VISIBLE_DEVICES"] for index in (0, 1)] == ["7,6", "5,4"]
    assert launch.started(0, 1)["JAX_LOCAL_DEVICE_IDS"] == "0,1"
    assert (logs / "process_1.log").read_text() == "line 1\n"


@pytest.mark.parametrize(
    ("plan", "code", "starts"),
    [
        ([[75, 75], [0, 0]], 0, 2),  # preempted
        ([["hangs", "dies"], [0, 0]], 0, 2),  # one is lost, the other waits for it and has to be killed
        ([["saves", 75], [0, 0]], 0, 2),
        ([[1, "saves"]], 1, 1),  # an error; what stops the other does not hide it
        ([[75, 75]], 75, 3),  # RESTARTS
    ],
)
def test_what_ends_a_run_and_what_restarts_it(tmp_path, plan, code, starts):
    launch = Launch(tmp_path, plan)
    assert launch.wait() == code, launch.output
    assert launch.starts == starts


def test_killed_from_outside(tmp_path):
    launch = Launch(tmp_path, [["saves", "saves"], [0, 0]])
    victim = launch.started(0, 1)["pid"]
    launch.started(0, 0)
    os.kill(victim, signal.SIGKILL)
    assert launch.wait() == 0
    assert launch.starts == 2
    assert "process 1 ended with exit code 137" in launch.output
    assert (tmp_path / "stopped_0_0").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_are_passed_on_and_end_the_restarts(tmp_path, number):
    launch = Launch(tmp_path, [["saves", "saves"]])
    for index in (0, 1):
        launch.started(0, index)
    launch.process.send_signal(number)
    assert launch.wait() == 75
    assert launch.starts == 1
    assert (tmp_path / "stopped_0_0").exists()
    assert (tmp_path / "stopped_0_1").exists()


def test_one_that_does_not_stop_is_killed_and_not_taken_for_done(tmp_path):
    launch = Launch(tmp_path, [["hangs", "saves"]], GRACE="1")
    for index in (0, 1):
        launch.started(0, index)
    launch.process.send_signal(signal.SIGTERM)
    assert launch.wait() == 75
    assert "process 0 ended with exit code 137" in launch.output


def dry(script, *arguments, **variables):
    process = subprocess.run(
        [LAUNCH / script, *arguments], env=os.environ | {"DRY_RUN": "1"} | variables, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_are_bash_and_say_what_they_take(script):
    subprocess.run(["bash", "-n", LAUNCH / script], check=True)
    text = dry(script, "--help")
    assert f"launch/{script}" in text
    assert "RESTARTS (" in text
    assert "check" in text
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", LAUNCH / script], check=True)


def test_wrong_settings_are_named(tmp_path):
    for script, variables, words in (
        ("local.sh", {"PROCESSES": "none"}, "PROCESSES=none: must be"),
        ("local.sh", {"PLATFORM": "tpu"}, "PLATFORM=tpu: must be"),
        ("local.sh", {"PLATFORM": "cuda", "CUDA_VISIBLE_DEVICES": "0"}, "CUDA_VISIBLE_DEVICES has 1"),
        ("slurm.sh", {"TASKS": "core"}, "TASKS=core: must be"),
        ("gke.sh", {}, "CLUSTER is not set"),
        ("tpu_vm.sh", {}, "fly: must be"),
    ):
        arguments = ["--config", "x"] if script in ("local.sh", "slurm.sh") else ["fly"]
        process = subprocess.run(
            [LAUNCH / script, *arguments], env=os.environ | variables, capture_output=True, text=True, cwd=tmp_path
        )
        assert process.returncode == 1
        assert words in process.stderr


def test_slurm(tmp_path):
    text = dry("slurm.sh", "--config", "x", NODES="2", GPUS="4")
    assert "--nodes=2 --ntasks-per-node=1 --gpus-per-node=4" in text
    assert "--signal=TERM@120 --requeue" in text
    assert "--ntasks-per-node=4" in dry("slurm.sh", "--config", "x", GPUS="4", TASKS="gpu")
    assert "python -m wkd_jax.main --check --config x --distributed" in dry("slurm.sh", "--check", "--config", "x")


@pytest.mark.parametrize(
    ("code", "restarted", "requeued"),
    [(75, 0, True), (137, 3, True), (75, 50, False), (1, 0, False), (0, 0, False)],
)
def test_slurm_job_goes_back_into_the_queue(tmp_path, code, restarted, requeued):
    for name, body in (("srun", f'echo "$JAX_LOCAL_DEVICE_IDS $*"; exit {code}'), ("scontrol", 'echo "scontrol $*"')):
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    settings = {"WKD_JAX_JOB": "yes", "SLURM_JOB_ID": "42", "SLURM_RESTART_COUNT": str(restarted), "GPUS": "4"}
    process = subprocess.run(
        [LAUNCH / "slurm.sh", "--config", "a b"],
        env=os.environ | settings | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
    )
    assert process.returncode == code
    assert process.stdout.startswith("0,1,2,3 ")
    assert ("scontrol requeue 42" in process.stdout) == requeued


def test_gke():
    settings = {"CLUSTER": "pods", "IMAGE": "image", "SPOT": "1", "ZONE": "here"}
    text = dry("gke.sh", "create", "--config", "a b", **settings)
    assert "--cluster=pods --workload=wkd-jax" in text
    assert "--restart-on-exit-codes=75" in text
    assert "--spot --zone=here" in text
    assert r"--command=exec python -m wkd_jax.main --config a\ b --distributed" in text
    check = dry("gke.sh", "check", "--config", "x", **settings)
    assert "--workload=wkd-jax-check" in check
    assert "--max-restarts=0" in check
    assert "--check --config x --distributed" in check
    assert "jobset-name=wkd-jax" in dry("gke.sh", "logs", **settings)
    assert "workload delete" in dry("gke.sh", "delete", **settings)


def test_tpu_vm():
    settings = {"BUCKET": "bucket", "ZONE": "here", "PROJECT": "mine"}
    text = dry("tpu_vm.sh", "create", **settings)
    assert "queued-resources create wkd-jax" in text
    assert "--spot" in text
    assert "--zone=here --project=mine" in text
    several = dry("tpu_vm.sh", "create", **settings, SLICES="4", SPOT="")
    assert "--node-count=4 --node-prefix=wkd-jax" in several
    assert "--spot" not in several
    assert "gcsfuse" in dry("tpu_vm.sh", "setup", **settings)
    assert "mount -t nfs server:/share" in dry("tpu_vm.sh", "setup", NFS="server:/share")
    check = dry("tpu_vm.sh", "check", "--config", "a b")
    assert "--node=all --worker=all" in check
    assert r"python -m wkd_jax.main --check --config a\ b --distributed" in check
    for verb in ("logs", "status", "stop", "delete"):
        assert "queued-resources" in dry("tpu_vm.sh", verb)


class Workers:
    """A stand-in for gcloud: what would run on a worker runs here, in a home of its own, while the machine is there."""

    GCLOUD = """#!/usr/bin/env bash
echo "$*" | head -1 >>"$WORKERS/calls"
case "$*" in
  *" create "*) touch "$WORKERS/machine" ;;
  *" delete "*) rm -rf "$WORKERS/machine" "$WORKERS/home" ;;
  *" describe "*) test -e "$WORKERS/machine" && echo ACTIVE || echo SUSPENDED ;;
esac
for word in "$@"; do
  if [[ $word == --command=*apt-get* ]]; then
    mkdir -p "$WORKERS/home/wkd_jax" "$WORKERS/home/venv/bin" && touch "$WORKERS/home/venv/bin/activate"
  elif [[ $word == --command=* ]]; then
    HOME=$WORKERS/home bash -c "${word#--command=}"
  fi
done
"""

    def __init__(self, folder, training):
        self.folder = folder
        (folder / "bin").mkdir()
        (folder / "bin" / "gcloud").write_text(self.GCLOUD)
        (folder / "bin" / "gcloud").chmod(0o755)
        (folder / "train.sh").write_text(training)
        path = f"{folder / 'bin'}:{os.environ['PATH']}"
        settings = {"PATH": path, "WORKERS": str(folder), "NFS": "server:/share", "POLL": "0.3"}
        self.environment = os.environ | settings | {"COMMAND": f"bash {folder / 'train.sh'} {folder}"}

    def run(self, *arguments):
        process = subprocess.run(
            [LAUNCH / "tpu_vm.sh", *arguments], env=self.environment, capture_output=True, text=True, timeout=40
        )
        return process.returncode

    @property
    def log(self):
        return (self.folder / "home" / "train.log").read_text()


def test_tpu_vm_restarts_on_the_worker(tmp_path):
    training = 'echo "$*"; test -e "$1/once" && exit 0; touch "$1/once"; exit 75\n'
    workers = Workers(tmp_path, training)
    assert workers.run("create") == workers.run("setup") == 0
    assert workers.run("run", "--config", "a b") == 0
    assert workers.log.count("--config a b --distributed") == 2
    assert workers.log.count("launch: exit code 75") == 1


def test_tpu_vm_gives_an_errors_code(tmp_path):
    workers = Workers(tmp_path, "exit 3\n")
    assert workers.run("resume", "--config", "x") == 3  # makes the machine first
    assert workers.log == "launch: exit code 3\n"


def test_tpu_vm_brings_a_lost_slice_back(tmp_path):
    training = 'test -e "$1/once" && exit 0; touch "$1/once"; rm "$1/machine"; exec sleep 10\n'
    workers = Workers(tmp_path, training)
    assert workers.run("create") == workers.run("setup") == 0
    assert workers.run("run", "--config", "x") == 0
    calls = (tmp_path / "calls").read_text()
    assert calls.count(" create ") == 2
    assert calls.count(" scp ") == 2
