"""The page of several runs: what it says of fabricated ones, and what is refused."""

import json
import os
import pathlib
import re
import subprocess
import sys

import detection_test
import numpy as np
import pytest
import report_test
from inert_page import HOSTILE, Page, assert_inert

from wkd_jax import config as config_lib
from wkd_jax import report
from wkd_jax.report import compare, plots, several
from wkd_jax.report.__main__ import main


def fill(directory, *, name="tiny", seed=0, top1=70.0, finished=True, lines=None, methods=("kd",), rate=0.1, **how):
    """A run of classifiers with a complete config; `how` goes to the other page's tests."""
    directory.mkdir(parents=True)
    report_test.fill(directory, name=name, finished=finished, relation=False, lines=lines, **how)
    given = {"name": name, "seed": seed, "epochs": 3, "data": {"name": "digits"}, "student": {"name": "resnet8"}}
    given |= {"methods": {method: {} for method in methods}, "optimizer": {"learning_rate": rate}}
    given |= {"teacher": {"train": {"data": {"name": "digits"}, "student": {"name": "resnet20"}}}} if methods else {}
    config = json.loads(config_lib.to_json(config_lib.resolve(given)))
    (directory / "config.json").write_text(json.dumps(config))
    result = directory / "result.json"
    if finished:
        content = json.loads(result.read_text()) | {"name": name, "student_top1": top1, "methods": list(methods)}
        content |= {"best": {"student_top1": top1 + 0.25, "step": 20}, "config": config}
        result.write_text(json.dumps(content | {"identity": {"data": "d", "teacher": "t"}}))
    return directory


def fill_detection(directory, *, name="drawn", ap=33.26, **how):
    """A run of detectors."""
    fill(directory, name=name, finished=False, lines=[])
    config = json.loads((directory / "config.json").read_text()) | {"task": {"name": "detection"}}
    detection_test.fill(directory, lines=list(detection_test.records()), **how)
    (directory / "config.json").write_text(json.dumps(config))
    if (directory / "result.json").exists():
        content = json.loads((directory / "result.json").read_text()) | {"name": name, "student_AP": ap}
        (directory / "result.json").write_text(json.dumps(content))
    return directory


def logged(*values, key="total", first=1):
    """Lines of a log of the training."""
    return [json.dumps({"step": first + i, "kind": "train", key: value}) + "\n" for i, value in enumerate(values)]


def written(tmp_path, *workdirs, links=()):
    """The page, checked to be inert."""
    source = report.write_comparison(workdirs, tmp_path / "page.html").read_text(encoding="utf-8")
    return source, assert_inert(source, links)


def cells(source, head):
    """Rows of the table whose head has this cell, as lists of texts."""
    for table in re.findall(r"<table.*?</table>", source, re.DOTALL):
        rows = [
            [" ".join(Page(cell).words.split()) for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL)]
            for row in re.findall(r"<tr>(.*?)</tr>", table, re.DOTALL)
        ]
        if head in rows[0]:
            return rows
    raise AssertionError(f"no table with {head!r}")


def captions(source):
    return re.findall(r"<figcaption>(.*?)</figcaption>", source)


@pytest.fixture(scope="module", name="four")
def _four(tmp_path_factory):
    """Two seeds of kd, an unfinished wkd_l, and a student alone with another learning rate."""
    root = tmp_path_factory.mktemp("four")
    fill(root / "a", name="kd", seed=0, top1=70.0)
    fill(root / "b", name="kd", seed=1, top1=74.0)
    fill(root / "c", name="wkd", methods=("wkd_l",), finished=False)
    fill(root / "d", name="alone", methods=(), top1=60.0, rate=0.2)
    report.write(root / "b")
    source = report.write_comparison([root / name for name in "dcba"], root / "out" / "page.html").read_text()
    return root, source


def test_one_row_a_run_best_first_and_the_unfinished_last(four):
    _, source = four
    head, *rows = cells(source, "run")
    shown = [dict(zip(head, row, strict=True)) for row in rows]
    assert [row["run"] for row in shown] == ["kd, seed 1 b", "kd, seed 0 a", "alone d", "wkd c"]
    assert [row["top-1, last, %"] for row in shown] == ["74.00", "70.00", "60.00", "80.00"]
    assert [row["best, %"] for row in shown] == [
        "74.25 at step 20", "70.25 at step 20", "60.25 at step 20", "80.00 at step 30",
    ]  # fmt: skip
    assert [row["methods"] for row in shown] == ["kd", "kd", "none", "wkd_l"]
    assert [row["seed"] for row in shown] == ["1", "0", "0", "0"]
    assert shown[0]["student"] == "resnet8" and shown[0]["teacher"] == "resnet20 91.25 %"
    assert [row["agreement, %"] for row in shown] == ["70.00"] * 3 + ["83.00"]
    assert [row["time"] for row in shown] == ["1 h 2 min"] * 3 + ["–"]
    assert [row["steps"] for row in shown] == ["30 finished"] * 3 + ["30 unfinished, 3 of 3 epochs"]
    words = Page(source).words
    assert "Comparison of 4 runs methods kd, none, wkd_l" in words
    assert "3 finished, 1 unfinished" in words
    assert "Best top-1 74.00 % kd, seed 1 Worst top-1 60.00 % alone Range 14.00" in words


def test_the_only_links_lead_to_reports_that_exist(four):
    root, source = four
    assert re.findall(r'href="([^"]*report.html)"', source) == ["../b/report.html"]
    assert (root / "out" / "../b/report.html").resolve() == (root / "b" / "report.html").resolve()
    assert_inert(source, ["../b/report.html"])


def test_seeds_are_put_together(four):
    head, *rows = cells(four[1], "spread")
    assert head == [
        "runs", "seeds", "finished", "mean top-1, last, %", "spread", "mean top-1, best, %", "mean agreement, %",
    ]  # fmt: skip
    assert rows == [["kd", "0, 1", "2 of 2", "72.00", f"{np.std([70, 74], ddof=1):.2f}", "72.25", "70.00"]]


def test_other_settings_or_an_unfinished_seed_do_not_enter_a_mean(tmp_path):
    for seed, top1 in enumerate((50.0, 60.0)):
        fill(tmp_path / f"{seed}", seed=seed, top1=top1)
    fill(tmp_path / "2", seed=2, finished=False)
    fill(tmp_path / "3", seed=3, top1=99.0, rate=0.3)
    source, _ = written(tmp_path, *(tmp_path / f"{i}" for i in range(4)))
    _, row = cells(source, "spread")
    assert row[1:5] == ["0, 1, 2", "2 of 3", "55.00", f"{np.std([50, 60], ddof=1):.2f}"]
    source, page = written(tmp_path, tmp_path / "0", tmp_path / "3")
    assert "spread" not in page.words


def test_curves_that_are_shared(four):
    _, source = four
    assert captions(source) == [
        "top-1 in evaluation, %", "agreement in evaluation, %", "total loss", "label/cross_entropy",
        "wkd_l/wasserstein", "The students&#39; accuracy by class, hardest first",
    ]  # fmt: skip
    drawn = re.findall(r'aria-label="Curves over the steps: ([^"]*)"', source)
    assert drawn[0] == "kd, seed 1, kd, seed 0, alone, wkd"
    legend = re.search(r'<ul class="key">(.*?)</ul>', source, re.DOTALL)[1]
    assert [" ".join(re.sub("<.*?>", " ", item).split()) for item in re.findall(r"<li>(.*?)</li>", legend)] == [
        "kd, seed 1", "kd, seed 0", "alone", "wkd",
    ]  # fmt: skip


def test_what_one_run_alone_has_is_left_out_and_rates_are_drawn_where_they_differ(tmp_path):
    one, two = logged(0.1, 0.2, key="learning_rate"), logged(0.1, 0.1, key="learning_rate")
    fill(tmp_path / "a", name="a", lines=logged(1.0, 2.0) + one, finished=False)
    fill(tmp_path / "b", name="b", lines=two, finished=False)
    fill(tmp_path / "c", name="c", lines=one, finished=False)
    source, page = written(tmp_path, tmp_path / "a", tmp_path / "b")
    assert captions(source) == ["learning rate"]
    source, page = written(tmp_path, tmp_path / "a", tmp_path / "c")
    assert captions(source) == []
    assert "The runs have logged nothing that can be drawn together yet." in page.words


def test_points_that_are_not_finite_are_marked_and_their_run_named(tmp_path):
    fill(tmp_path / "a", name="a", lines=logged(1.0, "nan", 2.0, "inf"), finished=False)
    fill(tmp_path / "b", name="b", lines=logged(1.0, 2.0), finished=False)
    source, page = written(tmp_path, tmp_path / "a", tmp_path / "b")
    assert captions(source) == ["total loss (points not finite, marked in red: 2 of a)"]
    figure = re.search(r"<figcaption>total loss.*?</figure>", source, re.DOTALL)[0]
    assert plots.svg.ALARM in figure
    assert "Comparison of 2 runs" in page.words and "0 finished, 2 unfinished" in page.words


def test_config_differences_are_all_and_only_those_that_differ(four):
    head, *rows = cells(four[1], "setting")
    assert head == ["setting", "kd, seed 1", "kd, seed 0", "alone", "wkd"]
    found = {key: values for key, *values in rows}
    assert found.keys() == {"name", "seed", "teacher", "methods.kd", "methods.wkd_l", "optimizer.learning_rate"}
    assert found["seed"] == ["1", "0", "0", "0"]
    assert found["optimizer.learning_rate"] == ["0.1", "0.1", "0.2", "0.1"]
    assert "temperature 4.0" in found["methods.kd"][0] and found["methods.kd"][2:] == ["–", "–"]
    assert re.fullmatch(r"\(\d+ settings\)", found["teacher"][0]) and found["teacher"][2] == "null"


def test_a_section_that_some_have_not_is_written_or_counted_and_gone_into():
    long = {f"k{i}": i for i in range(30)}
    configs = [{"a": long, "b": {"x": 1}}, {"a": long | {"k3": "other"}, "b": {}}, {"a": None, "c": [1]}]
    assert several._differences(configs) == [
        ("a", ["(30 settings)", "(30 settings)", "null"]),
        ("a.k3", ["3", "other", "–"]),
        ("b", ["x 1", "{}", "–"]),
        ("c", ["–", "–", "[1]"]),
    ]
    assert several._differences(configs[:1]) == several._differences([configs[0]] * 3) == []


def test_classes_side_by_side_hardest_first_with_the_best_in_bold(tmp_path):
    for name in "ab":
        fill(tmp_path / name, name=name)
        evaluation = json.loads((tmp_path / name / "evaluation.json").read_text())
        evaluation["student_correct"] = [9, 2, 5, 0] if name == "a" else [7, 4, 5, 0]
        evaluation["count"][3], evaluation["confusion"] = 0, None  # a class without examples
        evaluation["teacher_correct"] = evaluation["agree"] = None
        (tmp_path / name / "evaluation.json").write_text(json.dumps(evaluation))
    source, _ = written(tmp_path, tmp_path / "a", tmp_path / "b")
    head, *rows = cells(source, "class")
    assert head == ["class", "a", "b", "range"]
    assert rows == [
        ["yak", "20.0", "40.0", "20.0"],
        ["xerus", "50.0", "50.0", "0.0"],
        ["zebra", "90.0", "70.0", "20.0"],
        ["wolf", "–", "–", "–"],
    ]
    table = source[source.index("<th>class</th>") :]
    assert re.findall(r"<b>([\d.]+)</b>", table) == ["40.0", "90.0"]


def test_many_classes_are_shortened_and_other_classes_not_compared(tmp_path):
    names = [f"class {i}" for i in range(60)]
    fill(tmp_path / "a", name="a", names=names)
    fill(tmp_path / "b", name="b", names=names)
    fill(tmp_path / "c", name="c")
    source, page = written(tmp_path, tmp_path / "a", tmp_path / "b")
    assert "The 10 classes on which the students' accuracy differs most, %" in page.words
    assert [len(table) for table in (cells(source, "class"), cells(source[source.index("<details") :], "class"))] == [
        11,
        61,
    ]
    _, page = written(tmp_path, tmp_path / "a", tmp_path / "c")
    assert "The runs are of different classes, so there is no comparison by class." in page.words
    fill(tmp_path / "d", name="d", names=names, finished=False)
    _, page = written(tmp_path, *(tmp_path / name for name in "abd"))
    assert "Not evaluated by class yet: d." in page.words


def test_classifiers_and_detectors_are_apart(tmp_path):
    fill(tmp_path / "a", name="a")
    fill(tmp_path / "b", name="b")
    fill_detection(tmp_path / "c", name="c", ap=30.0)
    fill_detection(tmp_path / "d", name="d", ap=31.0)
    fill_detection(tmp_path / "e", name="e", finished=False)
    (tmp_path / "e" / "metrics.jsonl").write_text("")  # not evaluated yet: nothing but its task says what it is
    source, page = written(tmp_path, *(tmp_path / name for name in "caebd"))
    assert "They are measured by top-1 and by AP" in page.words
    tables = source.split("Runs measured by AP")
    assert [row[0] for row in cells(tables[0], "run")[1:]] == ["a", "b"]
    assert [row[0] for row in cells(tables[1], "run")[1:]] == ["d", "c", "e"]
    assert cells(tables[1], "run")[0][5:8] == ["AP, last, %", "best, %", "AP50, %"]
    assert "AP in evaluation, %" in captions(tables[1]) and "top-1 in evaluation, %" not in captions(tables[1])
    assert cells(tables[1], "class")[0] == ["class", "d", "c", "range"]


def test_runs_on_other_data_are_warned_of(tmp_path):
    fill(tmp_path / "a", name="a")
    fill(tmp_path / "b", name="b")
    result = json.loads((tmp_path / "b" / "result.json").read_text())
    (tmp_path / "b" / "result.json").write_text(json.dumps(result | {"identity": {"data": "e", "teacher": "t"}}))
    source, page = written(tmp_path, tmp_path / "a", tmp_path / "b")
    assert "Careful: the runs had 2 different contents of data: the images were not the same ones." in page.words
    assert 'class="careful"' in source and "different contents of teacher" not in page.words


def test_names_are_distinct_and_no_longer_than_needed(tmp_path):
    def labels(*runs):
        return [each.label for each in several._shown(runs, [None] * len(runs))]

    made = {
        key: report.read(fill(tmp_path / key, name=name, seed=seed))
        for key, (name, seed) in {"1": ("a", 0), "2": ("a", 1), "3": ("b", 0), "4": ("a", 0), "x/1": ("a", 0)}.items()
    }
    assert labels(made["1"], made["3"]) == ["a", "b"]
    assert labels(made["1"], made["2"], made["3"]) == ["a, seed 0", "a, seed 1", "b"]
    assert labels(made["1"], made["4"]) == ["1", "4"]
    assert labels(made["1"], made["x/1"]) == [str(tmp_path / "1"), str(tmp_path / "x/1")]


def test_styles_are_distinct_for_forty_runs_and_seeds_share_a_colour():
    assert len(set(plots.styles(range(40)))) == 40
    assert len(set(plots.styles([0, 0, 0, 1, 1, 1, 8, 8]))) == 8
    assert len({style.colour for style in plots.styles([3, 3, 3, 3])}) == 1
    assert len(set(plots.styles([0] * 6))) == 5  # then they repeat, and the page says so


def test_more_runs_than_lines_are_said_to_look_alike(tmp_path):
    runs = [fill(tmp_path / str(seed), seed=seed, lines=[], finished=False) for seed in range(6)]
    for run in runs:
        (run / "metrics.jsonl").write_text("".join(logged(1.0, 2.0)))
    assert "some look alike" not in written(tmp_path, *runs[:5])[1].words
    assert "some look alike" in written(tmp_path, *runs)[1].words


def test_same_bytes_in_any_order_in_a_fresh_process_without_jax(four):
    root, source = four
    code = (
        "import sys; from wkd_jax.report.__main__ import main; code = main(sys.argv[1:]); "
        "assert 'jax' not in sys.modules; sys.exit(code)"
    )
    base = pathlib.Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONHASHSEED": "1", "PYTHONPATH": os.pathsep.join([str(base), *sys.path])}
    again = root / "out" / "again.html"
    command = [sys.executable, "-c", code, *(str(root / name) for name in "badc"), "--out", str(again)]
    done = subprocess.run(command, check=True, env=environment, capture_output=True, text=True)
    assert done.stdout == f"comparison: {again}\n"
    assert again.read_text() == source


def test_hostile_names_and_settings_are_inert(tmp_path):
    for i, name in enumerate(HOSTILE[:5]):
        place = fill(tmp_path / f"'{i} \"&<b>", name="x", lines=[], names=HOSTILE)
        for file in ("config.json", "result.json"):
            content = json.loads((place / file).read_text()) | {"name": name, name: HOSTILE[5 - i], "devices": name}
            (place / file).write_text(json.dumps(content))
        (place / "metrics.jsonl").write_text("".join(logged(1.0) + logged(1.0, key=f"{HOSTILE[0]}/x", first=2)))
        report.write(place)
    runs = [path for path in tmp_path.iterdir() if path.is_dir()]
    links = [f"%27{i}%20%22%26%3Cb%3E/report.html" for i in range(5)]
    source, page = written(tmp_path, *runs, links=links)
    assert all(name in page.words for name in HOSTILE[:5])
    assert source.count("report.html") == 5
    assert not {"script", "img", "iframe"} & set(page.tags)


def test_what_cannot_be_compared_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fill(tmp_path / "a")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "a")

    def refused(*arguments):
        assert main([str(each) for each in arguments]) == 1
        assert not (tmp_path / "compare").exists()
        return capsys.readouterr().err

    assert refused("a", "empty") == "error: empty: no run in this directory: it has no config.json\n"
    assert "error: absent: no such work directory" in refused("a", "absent")
    assert refused("a", "link") == "error: a and link: the same run, given twice; leave one out\n"
    assert refused("a", "a", "a") == "error: a and a: the same run, given twice; leave one out\n"
    fill(tmp_path / "b")
    assert "empty: not the name of a page; give a file that ends in .html" in refused("a", "b", "--out", "empty")
    assert "a/result.json: not the name of a page" in refused("a", "b", "--out", "a/result.json")
    (tmp_path / "b" / "config.json").write_text('{"name": "b", "seed": 0}')
    assert "error: b/config.json: not of a run of this version" in refused("a", "b")
    with pytest.raises(SystemExit, match="2"):
        main([])
    assert "RUN" in capsys.readouterr().err
    with pytest.raises(ValueError, match="no runs to compare"):
        report.write_comparison([])


def test_command_line_with_one_and_with_several(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fill(tmp_path / "a")
    fill(tmp_path / "b", seed=1)
    assert main(["a"]) == 0 and main(["a", "--out", "elsewhere.html"]) == 0
    assert capsys.readouterr().out == "report: a/report.html\nreport: elsewhere.html\n"
    assert (tmp_path / "elsewhere.html").read_bytes() == (tmp_path / "a" / "report.html").read_bytes()
    assert main(["a", "b"]) == 0
    (path,) = (tmp_path / "compare").iterdir()
    assert capsys.readouterr().out == f"comparison: compare/{path.name}\n"
    assert re.fullmatch(r"2-runs-[0-9a-f]{8}\.html", path.name)
    assert '<a href="../a/report.html">' in path.read_text()
    assert main(["./b", str(tmp_path / "a")]) == 0
    assert list((tmp_path / "compare").iterdir()) == [path]


def test_help_says_what_it_is_for(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    for expected in (
        "RUN [RUN ...]",
        "--out FILE",
        "best first",
        "python -m wkd_jax.compare",
        "compare/N-runs-HASH.html",
    ):
        assert expected in said, expected


def test_results_without_devices_or_versions_are_compared_all_the_same():
    entry = compare.Entry("a", 0, "a", "finished", result={"student_top1": 1.0})
    assert compare.made_with([entry])[0] == "Devices: not recorded."
