"""The comparison command: what it runs, what it collects, and what it does about faults."""

import json
import pathlib
import re

import pytest

from wkd_jax import compare, config_file
from wkd_jax import config as config_lib
from wkd_jax import main as main_lib
from wkd_jax.report.published import TABLES
from wkd_jax.training import loop, preemption

CONFIG = """
def base(name, seed):
    return dict(
        name=name, seed=seed, epochs=1, global_batch_size=16,
        data=dict(name="digits", image_size=8, train_images=50), student=dict(name="resnet8"), log_every=1,
    )

def get_config(argument):
    args = dict(item.split("=") for item in argument.split(","))
    config = base("tiny_" + args["method"], int(args["seed"]))
    config["methods"] = {name: METHODS[name] for name in args["method"].split("+")}
    if args["method"] != "none":
        config["teacher"] = dict(train=base("tiny_teacher", 0))
    return config

METHODS = dict(none={}, kd=dict(weight=0.5), wkd_f=dict(projector="conv1x1", schedule=dict(name="constant")))
"""


@pytest.fixture(autouse=True)
def _home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.py").write_text(CONFIG)


def call(*arguments, seeds=1):
    return compare.main(["--config", "tiny.py", "--seeds", str(seeds), "--out", "out", *arguments])


def fabricate(run, top1=50.0):
    """A finished run where a comparison looks for it."""
    run.directory.mkdir(parents=True, exist_ok=True)
    result = {
        "student_top1": top1,
        "best": {"student_top1": top1, "step": 4},
        "seconds": 2.0,
        "devices": "1 x cpu",
        "versions": {},
        "identity": {"data": "d", "teacher": None},
        "config": run.config.to_dict(),
    }
    (run.directory / "result.json").write_text(json.dumps(result))


@pytest.fixture(name="made")
def _made(monkeypatch):
    """Runs are fabricated instead of trained; the list of them, by name and seed."""
    made = []

    def make(config, directory):
        made.append((config["name"], config["seed"]))
        fabricate(compare.Wanted("", 0, config), 50.0 + config["seed"])

    monkeypatch.setattr(main_lib, "make", make)
    return made


def table():
    return pathlib.Path("out/table.md").read_text()


def test_runs_are_made_once(monkeypatch, capsys):
    """Teacher and student for real; the same command again only collects, and writes the same bytes."""
    assert call("--methods", "kd") == 0
    printed = capsys.readouterr()
    assert printed.out == table()
    assert "run 1 of 1: kd, seed 0: in runs/tiny_kd-" in printed.err and "step 4" in printed.err
    assert sorted(re.sub("-.*", "", path.name) for path in pathlib.Path("runs").iterdir()) == [
        "tiny_kd",
        "tiny_teacher",
    ]
    assert re.search(
        r"\| `kd` +\| +\d+\.\d\d \| +– \| 1 of 1 \| +\d+\.\d\d \| +\d+\.\d\d \| +\d+\.\d \| +0 \|", table()
    )
    files = {path.name: path.read_bytes() for path in pathlib.Path("out").iterdir()}
    assert files.keys() == {"table.md", "table.csv", "plot.svg"}
    monkeypatch.setattr(loop, "run", lambda *arguments: pytest.fail("a finished run was run again"))
    assert call("--methods", "kd") == 0
    assert "run 1 of 1: kd, seed 0: collected from runs/tiny_kd-" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in pathlib.Path("out").iterdir()} == files


def test_stopped_in_the_middle_it_goes_on_where_it_was(made, monkeypatch, capsys):
    real, stop = main_lib.make, [KeyboardInterrupt(), preemption.Preempted("saved")]

    def make(config, directory):
        if stop and len(made) == 3 - len(stop):
            raise stop.pop(0)
        real(config, directory)

    monkeypatch.setattr(main_lib, "make", make)
    assert call("--methods", "none", "kd", seeds=2) == 130
    assert "1 of 2" in table() and "missing (seeds 0, 1)" in table()
    assert call("--methods", "none", "kd", seeds=2) == preemption.EXIT_CODE
    assert call("--methods", "none", "kd", seeds=2) == 0
    assert made == [("tiny_none", 0), ("tiny_none", 1), ("tiny_kd", 0), ("tiny_kd", 1)]
    assert "the same command goes on" in capsys.readouterr().err
    assert table().count("2 of 2") == 2 and "+0.00 ± 0.00 (2)" not in table() and "0.00 ± 0.00 (2)" in table()


def test_a_run_that_fails_does_not_end_the_others(monkeypatch, capsys):
    """A method that refuses the pair, for real, and a loss that is not finite."""

    def run(config, directory, teacher_directory):
        if config["methods"]:
            raise loop.TrainingError("step 3: total is nan")

    monkeypatch.setattr(loop, "run", run)
    monkeypatch.setattr(main_lib.report, "write", lambda directory: directory)
    assert call("--methods", "wkd_f", "kd", "--config.methods.wkd_f.grid=9") == 1
    assert re.search(
        r"\| `wkd_f` .* 0 of 1 .* failed: methods.wkd_f.grid=9: must be from 1 to 2, .*\(seed 0\)", table()
    )
    assert re.search(r"\| `kd` .* 0 of 1 .* failed: step 3: total is nan \(seed 0\)", table())
    assert "run 2 of 2: kd, seed 0" in capsys.readouterr().err
    assert not pathlib.Path("out/plot.svg").exists()


def test_collecting_runs_nothing_and_shows_what_is_missing(made, capsys):
    wanted = compare.plan("tiny.py", ["none", "kd"], 2, [])
    fabricate(wanted[0])
    wanted[1].directory.mkdir()
    (wanted[1].directory / "config.json").write_text(config_lib.to_json(wanted[1].config))
    assert call("--methods", "none", "kd", "--collect", seeds=2) == 0
    assert not made
    assert "unfinished (seed 1)" in table() and "missing (seeds 0, 1)" in table()


def test_runs_elsewhere_are_collected_and_others_are_not_mixed_in(made, capsys):
    run, other = compare.plan("tiny.py", ["none"], 1, []) + compare.plan("tiny.py", ["none"], 1, ["epochs=2"])
    fabricate(other, 10.0)
    pathlib.Path("far").mkdir()
    other.directory.rename("far/mine")
    fabricate(run, 20.0)
    run.directory.rename("far/theirs")
    assert call("--methods", "none", "--runs", "far") == 0
    assert not made and "20.00" in table() and "far/theirs" in pathlib.Path("out/table.csv").read_text()
    # In the place of a run lies another: it is neither collected nor overwritten.
    pathlib.Path("far/mine").rename(run.directory)
    assert call("--methods", "none") == 1
    assert not made and "holds a run of another config (epochs: 2 -> 1): move it away" in table()
    assert compare.main(["--config", "tiny.py", "--methods", "none", "--seeds", "1", "--runs", "nowhere"]) == 1
    assert "--runs nowhere: there is no such directory" in capsys.readouterr().err


def test_overrides_go_to_the_rows_that_have_what_they_set():
    overrides = ["epochs=3", "methods.kd.weight=0.25", "teacher.which=best"]
    none, kd = compare.plan("tiny.py", ["none", "kd"], 1, overrides)
    assert none.config.epochs == kd.config.epochs == 3
    assert none.config.teacher is None and kd.config.teacher.which == "best"
    assert kd.config.methods.kd.weight == 0.25


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "none", "--config.methods.kd.weight=1.0"], "no method of this comparison has that setting"),
        (["--methods", "none", "--config.seed=3"], "seed: comes from --methods and --seeds"),
        (["--methods", "none", "--config.epochs=0"], "epochs=0: must be above 0"),
        (["--methods", "kd", "--baseline", "none"], "--baseline none: not one of --methods kd"),
        (["--methods", "kd", "kd"], "given once"),
        (["--methods", "none,kd"], "--methods none,kd: names of methods, separated by spaces"),
        (["--methods", "kd", "--x"], "unknown argument '--x'"),
        ([], "--config needs --methods and --seeds"),
    ],
)
def test_wrong_command_lines(made, capsys, arguments, message):
    try:
        code = call(*arguments)
    except SystemExit as error:
        code = error.code
    assert code not in (0, None) and not made
    assert message in capsys.readouterr().err


def test_a_config_that_ignores_its_arguments_is_refused():
    text = CONFIG.replace('int(args["seed"])', "0")
    pathlib.Path("tiny.py").write_text(text)
    with pytest.raises(ValueError, match="method=kd,seed=0 and method=kd,seed=1 give the same run"):
        compare.plan("tiny.py", ["kd"], 2, [])


def test_time_left_and_default_place(made, capsys):
    fabricate(compare.plan("tiny.py", ["none"], 1, [])[0])  # took 2 seconds
    assert compare.main(["--config", "tiny.py", "--methods", "none", "--seeds", "3"]) == 0
    err = capsys.readouterr().err
    assert "run 2 of 3: none, seed 1: in runs/tiny_none-" in err and ", 2 to do, about 0:00:04 left" in err
    (out,) = pathlib.Path("compare").iterdir()
    assert re.fullmatch(r"tiny-[0-9a-f]{8}", out.name) and f"written: {out}/table.md" in err


def test_a_published_table(monkeypatch, capsys):
    config = "imagenet_wkd:pair=r34_r18,method=wkd_l"
    for seed, overrides in ((0, []), (7, []), (0, ["methods.wkd_l.weight=1.0"])):
        run = compare.Wanted("", 0, config_file.load_config(f"{config},seed={seed}", overrides))
        fabricate(run, 70.0 + seed)
    assert compare.main(["--table", "imagenet_r34_r18", "--out", "out"]) == 0
    out = capsys.readouterr().out
    assert out == table()
    (line,) = [line for line in out.splitlines() if line.startswith("| WKD-L  ")]
    assert [cell.strip() for cell in line.split("|")[2:-2]] == [
        "72.49", "90.75", "73.50 ± 4.95 (2)", "–", "73.50 ± 4.95 (2)", "2"
    ]  # fmt: skip
    assert f"`python -m wkd_jax.main --config {config}`" in line
    assert "like the row WKD-L, differs in methods.wkd_l.weight: 30.0 -> 1.0." in out
    assert compare.main(["--table", "imagenet_r34_r18:source=folder,data_dir=x", "--out", "out"]) == 0
    out = capsys.readouterr().out
    assert f"{config},source=folder,data_dir=x`" in out and "differs in data.name: 'image_folder' -> 'tfds" in out
    for wrong, message in (
        ("imagenet_r34", "did you mean 'imagenet_r34_r18'"),
        ("imagenet_r34_r18:method=kd", "method belongs to the rows of the table"),
        ("imagenet_r34_r18:pair=r50_mv1", "pair belongs to the rows of the table"),
    ):
        assert compare.main(["--table", wrong]) == 1
        assert message in capsys.readouterr().err
    assert compare.main(["--table", "imagenet_r34_r18:recipe=wkd", "--out", "out"]) == 0
    assert "no config" not in capsys.readouterr().out


@pytest.mark.parametrize("name", TABLES)
def test_every_row_that_can_be_made_has_a_config(name):
    for row in TABLES[name].rows:
        if row.config:
            config_file.load_config(row.config)
