"""The command line, end to end: results, resuming after kill -9, faults and their messages."""

import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from wkd_jax import main
from wkd_jax.training import checkpoint, metrics, preemption, workdir
from wkd_jax.weights.__main__ import main as weights_main

ROOT = pathlib.Path(__file__).parents[1]

CONFIG = """
from ml_collections import ConfigDict

def base(name, student, epochs):
    return dict(
        name=name, epochs=epochs, global_batch_size=32,
        data=dict(name="digits", image_size=8, train_images=320), task=dict(pad=1),
        student=dict(name=student), optimizer=dict(learning_rate=0.05, schedule="cosine"),
        log_every=5, eval_every=4, checkpoint_every=7, keep=2,
    )

def get_config(argument):
    config = base("student", "resnet8", 12)
    config["teacher"] = dict(train=base("teacher", "resnet8", 4))
    config["methods"] = {name: METHODS[name] for name in filter(None, argument.split("+"))}
    if not argument:
        config["teacher"] = None
    return ConfigDict(config)

METHODS = dict(kd={}, none={}, wkd_l=dict(weight=5.0), wkd_f=dict(weight=0.1, projector="conv1x1", grid=1))
"""


@pytest.fixture(scope="module", name="home")
def _home(tmp_path_factory):
    home = tmp_path_factory.mktemp("main")
    (home / "config.py").write_text(CONFIG)
    return home


def command(home: pathlib.Path, *arguments: str) -> tuple[list[str], dict[str, str]]:
    """The command line in a process of its own, with a shared compilation cache."""
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
        "JAX_COMPILATION_CACHE_DIR": os.environ.get("JAX_COMPILATION_CACHE_DIR", str(home / "jax")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
    }
    return [
        sys.executable,
        "-m",
        "wkd_jax.main",
        "--config",
        str(home / "config.py") + arguments[0],
        *arguments[1:],
    ], environment


def call(home: pathlib.Path, *arguments: str) -> subprocess.CompletedProcess:
    words, environment = command(home, *arguments)
    return subprocess.run(words, env=environment, cwd=home, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module", name="finished")
def _finished(home):
    """An uninterrupted run of WKD-L + WKD-F, teacher included."""
    done = call(home, ":wkd_l+wkd_f", "--workdir", "whole")
    assert done.returncode == 0, done.stderr
    return home / "whole", done


def test_the_command_does_it_all(finished):
    directory, done = finished
    assert done.stdout.splitlines()[-1] == f"report: {pathlib.Path('whole') / 'report.html'}"
    result = json.loads((directory / "result.json").read_text())
    assert result["steps"] == 120
    assert result["student_top1"] > 50 and result["teacher_top1"] > 50
    assert result["config"]["methods"]["wkd_l"]["weight"] == 5.0
    assert result["versions"]["jax"]
    for name in (
        "report.html",
        "config.json",
        "evaluation.json",
        "interrelation.npz",
        "metrics.jsonl",
        "teacher/report.html",
    ):
        assert (directory / name).stat().st_size, name
    lines = metrics.read(directory / "metrics.jsonl")
    assert [line["step"] for line in lines if line["kind"] == "train"] == list(range(5, 121, 5))
    assert [line["step"] for line in lines if line["kind"] == "eval"] == [40, 80, 120]
    first, last = [line for line in lines if line["kind"] == "train"][:: len(lines) - 4]
    assert last["total"] < first["total"]
    assert {"label/cross_entropy", "wkd_l/wasserstein", "wkd_l/marginal_error", "wkd_f/mean"} <= set(first)
    tree, _ = checkpoint.read(directory / workdir.CHECKPOINTS, which="latest")
    assert any(name.startswith("methods/wkd_f/") for name in tree["params"])
    assert not any("ground_cost" in name for name in tree["variables"])


def test_the_same_command_again_only_shows_the_report(finished, home):
    directory, _ = finished
    before = (directory / "result.json").stat().st_mtime_ns
    again = call(home, ":wkd_l+wkd_f", "--workdir", "whole")
    assert again.returncode == 0 and again.stdout.splitlines()[-1].startswith("report: ")
    assert (directory / "result.json").stat().st_mtime_ns == before


def killed_run(home: pathlib.Path, directory: pathlib.Path, moment) -> bool:
    """Starts the run, kills it -9 when `moment()` says so. False if it ended before."""
    words, environment = command(home, ":wkd_l+wkd_f", "--workdir", str(directory))
    process = subprocess.Popen(words, env=environment, cwd=home, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not moment():
        time.sleep(0.001)
    if process.poll() is not None:
        return False
    process.send_signal(signal.SIGKILL)
    process.wait()
    return True


def last_step(directory: pathlib.Path) -> int:
    path = directory / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return max((json.loads(line)["step"] for line in text.splitlines() if line.endswith("}")), default=0)


def writing(directory: pathlib.Path) -> bool:
    """Whether a checkpoint is being written at this moment: something in the directory is not under its final name."""
    folder = directory / workdir.CHECKPOINTS
    return folder.exists() and any(not path.name.isdigit() for path in folder.iterdir())


def same_result(left: pathlib.Path, right: pathlib.Path) -> None:
    """Bit-identical parameters and metrics."""
    trees = [checkpoint.read(path / workdir.CHECKPOINTS, which="latest")[0] for path in (left, right)]
    for group in ("params", "variables"):
        assert trees[0][group].keys() == trees[1][group].keys()
        for name, value in trees[0][group].items():
            assert np.array_equal(value.view(np.uint8), trees[1][group][name].view(np.uint8)), name
    lines = [
        [{k: v for k, v in line.items() if k not in metrics.TIME_KEYS} for line in metrics.read(path / "metrics.jsonl")]
        for path in (left, right)
    ]
    assert lines[0] == lines[1]
    results = [json.loads((path / "result.json").read_text()) for path in (left, right)]
    for result in results:
        del result["seconds"]
    assert results[0] == results[1]


def test_killed_runs_end_with_the_same_bits(finished, home):
    """Killed at a step between checkpoints, while a checkpoint is written, and just before the result."""
    whole, _ = finished
    directory = home / "killed"
    shutil.copytree(whole / "teacher", directory / "teacher")
    moments = [
        lambda: last_step(directory) >= 45,
        lambda: last_step(directory) > 45 and writing(directory),
        lambda: last_step(directory) >= 120,
    ]
    killed = [killed_run(home, directory, moment) for moment in moments]
    assert sum(killed) >= 2
    assert call(home, ":wkd_l+wkd_f", "--workdir", "killed").returncode == 0
    same_result(whole, directory)


def test_a_damaged_checkpoint_is_passed_over(finished, home):
    """The newest checkpoint is cut short: the run says so, takes the one before, and ends with the same bits."""
    whole, _ = finished
    directory = home / "damaged"
    shutil.copytree(whole, directory)
    for name in ("result.json", "report.html"):
        (directory / name).unlink()
    newest = max(
        (p for p in (directory / workdir.CHECKPOINTS).iterdir() if p.name.isdigit()), key=lambda p: int(p.name)
    )
    for path in newest.rglob("*"):
        if path.is_file() and path.stat().st_size > 1000:
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    done = call(home, ":wkd_l+wkd_f", "--workdir", "damaged")
    assert done.returncode == 0, done.stderr
    assert str(newest.name) in done.stdout + done.stderr and "damaged" in done.stdout + done.stderr
    same_result(whole, directory)


def test_another_config_does_not_touch_the_run(finished, home):
    whole, _ = finished
    done = call(home, ":wkd_l+wkd_f", "--workdir", "whole", "--config.epochs=3")
    assert done.returncode == 1
    assert "holds a run of another config (epochs: 12 -> 3)" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([":kd", "--config.student.name=resnet9"], "unknown models name 'resnet9': did you mean 'resnet"),
        ([":kd", "--config.methods.kd.temperature=-1.0"], "methods.kd.temperature=-1.0: must be above 0"),
        (
            [":wkd_f", "--config.methods.wkd_f.teacher_tap=stage9"],
            "methods.wkd_f.teacher_tap: unknown tap of resnet8 'stage9': did you mean 'stage",
        ),
        ([":wkd_f", "--config.methods.wkd_f.grid=4"], "methods.wkd_f.grid=4"),
        ([":wkd_f", "--config.methods.wkd_f.projector=conv2x2"], "did you mean 'conv3x3'"),
        ([":wkd_l", "--config.methods.wkd_l.gradient=unroled"], "did you mean 'unrolled'"),
        ([":kd", "--config.data.train_images=5000"], "train_images=5000"),
        ([":kd", "--config.global_batch_size=0"], "global_batch_size=0: must be above 0"),
        ([":wkd_l", "--config.interrelation.file=cost.npy"], "cost.npy"),
        ([":", "--confg.x=1"], "--confg.x=1"),
    ],
)
def test_what_is_wrong_is_said_before_anything_compiles(finished, home, tmp_path, capsys, arguments, message):
    whole, _ = finished
    np.save(home / "cost.npy", np.float32(1) - np.eye(7, dtype=np.float32))
    argv = ["--config", str(home / "config.py") + arguments[0], *arguments[1:], "--workdir", str(tmp_path / "run")]
    argv = [word.replace("=cost.npy", f"={home / 'cost.npy'}") for word in argv]
    shutil.copytree(whole / "teacher", tmp_path / "run" / "teacher")
    if "train_images" in arguments[1]:
        argv.append("--config.teacher.train.epochs=4")
    try:
        code = main.main(argv)
    except SystemExit as error:
        code = error.code
    assert code not in (0, None)
    assert message in capsys.readouterr().err


def test_teacher_with_other_classes(finished, home, tmp_path, monkeypatch, capsys):
    from wkd_jax.training import build

    whole, _ = finished
    real = build.data_set

    def nine_classes(config):
        data = real(config)
        keep = [split.labels < 9 for split in (data.train, data.test)]
        splits = [type(s)(s.images[k], s.labels[k]) for s, k in zip((data.train, data.test), keep, strict=True)]
        return type(data)(data.name, data.class_names[:9], *splits, data.mean, data.std)

    monkeypatch.setattr(build, "data_set", nine_classes)
    argv = ["--config", f"{home / 'config.py'}:kd", "--workdir", str(tmp_path / "run")]
    argv += ["--config.teacher.train=None", f"--config.teacher.run={whole / 'teacher'}"]
    assert main.main(argv) == 1
    assert "the teacher resnet8 has 10 classes, the data set digits has 9" in capsys.readouterr().err


def test_a_teacher_directory_without_a_run(home, tmp_path, capsys):
    argv = ["--config", f"{home / 'config.py'}:kd", "--workdir", str(tmp_path / "run")]
    argv += ["--config.teacher.train=None", f"--config.teacher.run={tmp_path / 'nothing'}"]
    assert main.main(argv) == 1
    assert "holds no run" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_stops_the_run(home, tmp_path):
    done = call(home, ":", "--workdir", str(tmp_path / "run"), "--config.optimizer.learning_rate=1e30")
    assert done.returncode == 1
    assert re.search(r"error: step \d+: \S+ is (nan|inf) \(not finite: .*no checkpoint was saved", done.stderr)
    assert "Lower optimizer.learning_rate" in done.stderr
    assert not (tmp_path / "run" / "result.json").exists()


def test_an_unwritable_work_directory(home, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main.main(["--config", f"{home / 'config.py'}:", "--workdir", str(tmp_path / "file" / "run")]) == 1
    message = capsys.readouterr().err
    assert "cannot be written" in message and "--workdir" in message


def test_the_student_is_checked_before_the_teacher_trains(home, tmp_path, capsys):
    """Neither a tap nor a file nor a grid waits for a teacher; and a rejected config does not own the directory."""
    for override, message in (
        ("methods.wkd_f.student_tap='stage9'", "unknown tap of resnet8 'stage9'"),
        ("methods.wkd_f.grid=9", "methods.wkd_f.grid=9: must be from 1 to 2"),
        ("interrelation.file='nowhere.npy'", "interrelation.file=nowhere.npy: there is no such file"),
        ("task.pad=8", "task.pad=8: must be from 0 to below the images' side, 8"),
    ):
        argv = ["--config", f"{home / 'config.py'}:wkd_l+wkd_f", "--workdir", str(tmp_path / "run")]
        assert main.main([*argv, f"--config.{override}"]) == 1
        assert message in capsys.readouterr().err
        assert not (tmp_path / "run").exists()


def test_resuming_with_another_teacher_is_refused(finished, home):
    whole, _ = finished
    directory = home / "swapped"
    shutil.copytree(whole, directory)
    (directory / "result.json").unlink()
    teacher = json.loads((directory / "teacher" / "result.json").read_text())
    teacher["mean"] = [0.0, 0.0, 0.0]
    (directory / "teacher" / "result.json").write_text(json.dumps(teacher))
    done = call(home, ":wkd_l+wkd_f", "--workdir", "swapped")
    assert done.returncode == 1
    assert "interrelation.npz holds the class similarity of something else" in done.stderr
    (directory / "interrelation.npz").unlink()
    done = call(home, ":wkd_l+wkd_f", "--workdir", "swapped")
    assert done.returncode == 1
    assert "the teacher and the similarity of this run changed since it began" in done.stderr


def test_two_processes_do_not_share_a_directory(home, tmp_path, capsys):
    config = main.load_config(f"{home / 'config.py'}:")
    with workdir.claim(tmp_path / "run", config):
        assert main.main(["--config", f"{home / 'config.py'}:", "--workdir", str(tmp_path / "run")]) == 1
    assert "another process is at work" in capsys.readouterr().err


def test_a_directory_without_a_checkpoint_is_taken_over(home, tmp_path):
    first, second = main.load_config(f"{home / 'config.py'}:"), main.load_config(f"{home / 'config.py'}:", ["seed=1"])
    for config in (first, second):
        with workdir.claim(tmp_path, config):
            assert json.loads((tmp_path / "config.json").read_text())["seed"] == config.seed
    (tmp_path / workdir.CHECKPOINTS / "7").mkdir(parents=True)
    with pytest.raises(ValueError, match="seed: 1 -> 0"), workdir.claim(tmp_path, first):
        pass


def test_overrides_of_unused_methods_are_refused(home):
    with pytest.raises(ValueError, match="this run does not use kd"):
        main.load_config(f"{home / 'config.py'}:wkd_l", ["methods.kd.weight=1.0"])


@pytest.fixture(scope="module", name="exported")
def _exported(finished, home):
    """The trained student in PyTorch's keys, without its connectors."""
    whole, _ = finished
    assert weights_main(["export", str(whole), "--to", "torch", "--out", str(home / "student.safetensors")]) == 0
    return home / "student.safetensors"


def test_an_exported_student_teaches(finished, home, exported):
    """A teacher that comes as a file scores what it scored, and a run with it begins from weights of a file as well."""
    whole, _ = finished
    result = json.loads((whole / "result.json").read_text())
    how = {"mean": tuple(result["mean"]), "std": tuple(result["std"])}
    done = call(
        home, ":kd", "--workdir", "from_file", "--config.teacher.train=None", f"--config.teacher.weights={exported}",
        "--config.teacher.model={'name': 'resnet8'}", f"--config.teacher.normalisation={how}",
        f"--config.init.weights={exported}", "--config.epochs=1", "--config.optimizer.learning_rate=1e-9",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "teacher: keys of mdistiller" in done.stderr and "student: keys of mdistiller" in done.stderr
    second = json.loads((home / "from_file" / "result.json").read_text())
    assert second["teacher_top1"] == result["student_top1"]
    assert second["student_parameters"] == result["student_parameters"]
    tree, _ = checkpoint.read(whole / workdir.CHECKPOINTS, which="latest")
    other, _ = checkpoint.read(home / "from_file" / workdir.CHECKPOINTS, which="latest")
    name = "student/layer1/0/conv1/kernel"  # at that rate it stays where it began
    np.testing.assert_allclose(other["params"][name], tree["params"][name], rtol=1e-5, atol=1e-6)


def test_an_imported_directory_says_what_it_is(finished, home, exported):
    """Neither the network nor its normalisation has to be said again; WKD's class similarity is made from it."""
    whole, _ = finished
    result = json.loads((whole / "result.json").read_text())
    six = ",".join(str(number) for number in (*result["mean"], *result["std"]))
    out = str(home / "imported")
    assert weights_main(["import", str(exported), "--model", "resnet8", "--out", out, "--normalisation", six]) == 0
    done = call(
        home, ":wkd_l", "--workdir", "from_directory", "--config.teacher.train=None",
        "--config.teacher.weights=imported", "--config.epochs=2",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    second = json.loads((home / "from_directory" / "result.json").read_text())
    assert second["teacher_top1"] == result["student_top1"]
    assert (home / "from_directory" / "interrelation.npz").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["teacher.weights=nowhere.pth"], "nowhere.pth: there is no such file"),
        (["teacher.weights=FILE"], "teacher.model is not set, and"),
        (["teacher.weights=FILE", "teacher.model={'name': 'resnet9'}"], "unknown models name 'resnet9'"),
        (["teacher.weights=FILE", "teacher.model={'name': 'resnet14'}"], "does not fit resnet14"),
        (["teacher.weights=FILE", "teacher.model={'name': 'resnet14'}"], "It looks like resnet8"),
        (
            ["teacher.run=x", "teacher.weights=FILE"],
            "set exactly one of teacher.run, teacher.train and teacher.weights",
        ),
        (["teacher.run=x", "teacher.model={'name': 'resnet8'}"], "has a meaning with teacher.weights alone"),
        (
            ["teacher.weights=FILE", "teacher.which=best"],
            "teacher.which='best': has a meaning with teacher.run and train",
        ),
        (["teacher.weights=FILE", "teacher.model=resnet8"], "teacher.model='resnet8': needs a section, such as"),
        (["teacher.weights=FILE", "teacher.normalisation={'mean': 1, 'std': 2}"], "needs a mean and a std"),
        (["teacher.weights=FILE", "teacher.normalisation={'mean': (0,0,0)}"], "needs a mean and a std"),
        (
            ["teacher.weights=FILE", "teacher.model={'name': 'resnet8'}", "init.weights=x.pth"],
            "x.pth: there is no such",
        ),
        (
            ["teacher.weights=FILE", "teacher.model={'name': 'resnet8'}", "student.name='vit_tiny_patch16_224'"],
            "the student vit_tiny_patch16_224 takes images of (224, 224) alone and the data set digits gives (8, 8)",
        ),
    ],
)
def test_wrong_weights_are_said_before_anything_trains(exported, home, tmp_path, capsys, overrides, message):
    argv = ["--config", f"{home / 'config.py'}:kd", "--workdir", str(tmp_path / "run"), "--config.teacher.train=None"]
    argv += [f"--config.{override}".replace("FILE", str(exported)) for override in overrides]
    assert main.main(argv) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_told_to_stop_during_an_evaluation_it_evaluates_when_it_goes_on(home, tmp_path, monkeypatch, capsys):
    """The state is saved at once, without its metric; the next start measures it and ends like an undisturbed run."""
    arguments = ["--config", f"{home / 'config.py'}:", "--config.epochs=4", "--config.eval_every=2"]
    assert main.main([*arguments, "--workdir", str(tmp_path / "whole")]) == 0
    asked = []

    def received(notice):
        asked.append(None)
        return len(asked) >= 25  # 20 steps of two epochs, then between batches of the evaluation

    with monkeypatch.context() as patch:
        patch.setattr(preemption.Notice, "received", received)
        assert main.main([*arguments, "--workdir", str(tmp_path / "stopped")]) == 75
    assert "stopped after step 20 of 40, which is saved" in capsys.readouterr().err
    assert not [line for line in metrics.read(tmp_path / "stopped" / "metrics.jsonl") if line["kind"] == "eval"]
    assert main.main([*arguments, "--workdir", str(tmp_path / "stopped")]) == 0
    same_result(tmp_path / "whole", tmp_path / "stopped")
    for name in ("whole", "stopped"):
        best = json.loads((tmp_path / name / "result.json").read_text())["best"]
        assert checkpoint.read(tmp_path / name / workdir.CHECKPOINTS, which="best")[1]["step"] == best["step"]
