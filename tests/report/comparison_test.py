"""The table and the figure of a comparison, and how runs are found: all from fabricated runs."""

import csv
import dataclasses
import io
import json
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from wkd_jax import config as config_lib
from wkd_jax.report import compare, dots, runs
from wkd_jax.report.published import TABLES, Row, Table

TOP1 = {"none": [81.2, 89.4, 84.0, 86.2], "kd": [95.8, 93.0, 94.4, 96.0]}


def result(top1, *, seed=0, teacher="t", data="d", devices="1 x cpu", **config):
    """What a run writes, as far as comparisons read it."""
    return {
        "student_top1": top1,
        "student_top5": 99.0,
        "best": {"student_top1": top1 + 0.5, "step": 7},
        "agreement": 90.0 if teacher else None,
        "teacher_top1": 98.0 if teacher else None,
        "method_parameters": 12345,
        "seconds": 3.0,
        "devices": devices,
        "versions": {"wkd_jax": "1.2", "jax": "0.10.2", "python": "3.11.0"},
        "identity": {"data": data, "teacher": teacher},
        "config": config_lib.resolve(resolved(seed=seed, **config)).to_dict(),
    }


def resolved(**config):
    return {"name": "run", "data": {"name": "digits"}, "student": {"name": "resnet8"}} | config


def entries():
    """Two whole rows but for kd's seeds 2 (failed) and 3 (missing), and a row that failed altogether."""
    made = [
        compare.Entry(
            method,
            seed,
            f"runs/{method}-{seed}",
            "finished",
            result=result(top1, seed=seed, teacher="t" if method == "kd" else None),
            step_ms=10.0 * (seed + 1),
        )
        for method, values in TOP1.items()
        for seed, top1 in enumerate(values)
    ]
    made[6] = compare.Entry("kd", 2, "runs/kd-2", "failed", reason="step 9: total is nan\n(a | b)")
    made[7] = compare.Entry("kd", 3, "runs/kd-3", "missing")
    return made + [compare.Entry("fcfd", seed, "x", "failed", reason="no such tap") for seed in range(4)]


def rows(markdown):
    """Header -> cell of each row of the only table."""
    lines = [re.split(r"(?<!\\)\|", line)[1:-1] for line in markdown.splitlines() if line.startswith("|")]
    head, _, *body = [[cell.strip() for cell in line] for line in lines]
    return {line[0].strip("`"): dict(zip(head, line, strict=True)) for line in body}


def test_the_table_has_means_spreads_and_paired_differences():
    table = rows(compare.markdown("title", "command", entries(), "none"))
    none, kd = table["none"], table["kd"]
    assert none["top-1, last epoch, %"] == f"{np.mean(TOP1['none']):.2f}"
    assert none["spread"] == f"{np.std(TOP1['none'], ddof=1):.2f}"
    assert none["top-1, best epoch, %"] == f"{np.mean(TOP1['none']) + 0.5:.2f}"
    assert none["difference to none"] == "baseline" and none["seeds"] == "4 of 4"
    assert (none["agreement, %"], none["teacher top-1, %"], none["remarks"]) == ("–", "–", "")
    assert none["ms a step"] == "25.0" and none["parameters added"] == "12,345"
    pairs = np.subtract(TOP1["kd"][:2], TOP1["none"][:2])  # of the seeds that both have
    error = np.std(pairs, ddof=1) / np.sqrt(2)
    assert kd["difference to none"] == f"+{pairs.mean():.2f} ± {error:.2f} (2)"
    assert kd["top-1, last epoch, %"] == f"{np.mean(TOP1['kd'][:2]):.2f}" and kd["ms a step"] == "15.0"


def test_failed_and_missing_runs_are_shown():
    table = rows(compare.markdown("title", "command", entries(), "none"))
    assert table["kd"]["seeds"] == "2 of 4"
    assert table["kd"]["remarks"] == "failed: step 9: total is nan (a \\| b) (seed 2); missing (seed 3)"
    failed = table["fcfd"]
    assert failed["seeds"] == "0 of 4" and failed["remarks"] == "failed: no such tap (seeds 0, 1, 2, 3)"
    assert failed["top-1, last epoch, %"] == failed["spread"] == failed["difference to none"] == "–"


def test_a_single_seed_has_no_spread_and_no_baseline_no_column():
    single = [run for run in entries() if run.seed == 0 and run.result]
    table = rows(compare.markdown("title", "command", single, None))
    assert table["kd"]["spread"] == "–"
    assert not [name for name in table["kd"] if name.startswith("difference")]
    assert rows(compare.markdown("t", "c", single, "none"))["kd"]["difference to none"] == "+14.60 ± – (1)"


def test_the_page_names_what_made_the_numbers():
    made = [run for run in entries() if run.result]
    page = compare.markdown("title", "python -m wkd_jax.compare --x", made, "none")
    assert "    python -m wkd_jax.compare --x\n" in page
    assert "- Devices: 1 x cpu.\n- Versions: wkd_jax 1.2, jax 0.10.2, python 3.11.0.\n" in page
    assert "- Seeds: 0, 1, 2, 3.\n" in page and "Careful" not in page
    assert page == compare.markdown("title", "python -m wkd_jax.compare --x", made, "none")
    made[0] = dataclasses.replace(made[0], result=result(80.0, teacher="u", data="e", devices="8 x TPU v5e"))
    page = compare.markdown("title", "command", made, "none")
    assert "- Devices: 1 x cpu (5 runs); 8 x TPU v5e (1 run).\n" in page
    assert "2 different contents of `data`" in page and "2 different contents of `teacher`" in page


def test_the_csv_has_every_run():
    lines = list(csv.DictReader(io.StringIO(compare.raw(entries()))))
    assert len(lines) == 12
    assert [float(line["student_top1"]) for line in lines[:4]] == TOP1["none"]
    assert (lines[0]["best_top1"], lines[0]["best_step"], lines[0]["jax"]) == ("81.7", "7", "0.10.2")
    assert lines[6]["reason"] == "step 9: total is nan\n(a | b)" and lines[6]["student_top1"] == ""
    assert [line["status"] for line in lines].count("failed") == 5


def test_the_figure_stands_alone_and_is_sorted_by_mean():
    values = {"none": [80.0, 82.0], "one & only": [85.0], "kd": [90.0, 91.0, 95.0]}
    figure = dots.draw("top-1, %", values, "none")
    assert figure == dots.draw("top-1, %", values, "none")
    assert "currentColor" not in figure and "var(" not in figure
    root = ET.fromstring(figure)
    assert root.tag == "{http://www.w3.org/2000/svg}svg" and root.get("width") == "540"
    texts = [element.text for element in root.findall(".//{*}text")]
    assert [text for text in texts if text in values] == ["kd", "one & only", "none"]

    def dashed(drawing):
        return drawing.count("stroke-dasharray")

    assert dashed(figure) == 1 and dashed(dots.draw("top-1, %", values, None)) == 0
    more = dots.draw("top-1, %", values | {"none": [80.0, 81.0, 82.0]}, "none")
    assert more.count("<use ") == figure.count("<use ") + 1  # every run has its mark


def detected(entry):
    """The same run, had it detected: AP a quarter of its top-1."""
    ap = entry.result["student_top1"] / 4
    kept = ("method_parameters", "seconds", "devices", "versions", "identity", "config")
    numbers = {
        "student_AP": ap,
        "student_AP50": ap + 20,
        "student_AP75": ap + 2,
        "student_APs": -1.0,
        "teacher_AP": 40.0,
    }
    numbers |= {"best": {"student_AP": ap + 0.25, "step": 7}} | {key: entry.result[key] for key in kept}
    return dataclasses.replace(entry, result=numbers)


def test_runs_of_detectors_are_compared_by_average_precision():
    made = [detected(run) if run.result else run for run in entries()]
    page = compare.markdown("title", "command", made, "none")
    table = rows(page)
    assert list(table["kd"]) == [
        "method", "AP, last evaluation, %", "spread", "seeds", "AP, best evaluation, %", "difference to none",
        "AP50, %", "AP75, %", "ms a step", "parameters added", "teacher AP, %", "remarks",
    ]  # fmt: skip
    mean = np.mean(TOP1["none"]) / 4
    shown = [table["none"][key] for key in ("AP, last evaluation, %", "AP50, %", "AP75, %", "AP, best evaluation, %")]
    assert shown == [f"{mean + more:.2f}" for more in (0, 20, 2, 0.25)]
    pairs = np.subtract(TOP1["kd"][:2], TOP1["none"][:2]) / 4
    error = np.std(pairs, ddof=1) / np.sqrt(2)
    assert table["kd"]["difference to none"] == f"+{pairs.mean():.2f} ± {error:.2f} (2)"
    assert table["kd"]["teacher AP, %"] == "40.00" and table["fcfd"]["AP50, %"] == "–"
    assert "- AP of the student" in page and "Top-1" not in page and "Agreement" not in page
    lines = list(csv.DictReader(io.StringIO(compare.raw(made))))
    assert [float(line["student_AP"]) for line in lines[:4]] == [top1 / 4 for top1 in TOP1["none"]]
    assert (float(lines[0]["best_AP"]), float(lines[0]["student_AP50"])) == (20.55, 40.3)
    assert "student_top1" not in lines[0] and lines[0]["best_step"] == "7" and lines[6]["student_AP"] == ""


def test_a_published_table_of_detectors():
    table = TABLES["coco_r101_r18"]
    found = {"KD": [detected(run) for run in entries() if run.method == "kd" and run.result]}
    shown = rows(compare.published(table, "command", found, {}, []))
    numbers = [shown["KD"][f"paper {name}, %"] for name in ("AP", "AP50", "AP75")]
    assert numbers == ["33.97", "54.66", "36.62"]
    mean, spread = np.mean(TOP1["kd"][:2]) / 4, np.std(TOP1["kd"][:2], ddof=1) / 4
    assert shown["KD"]["ours AP, last evaluation, %"] == f"{mean:.2f} ± {spread:.2f} (2)"
    assert shown["KD"]["ours AP50, %"] == f"{mean + 20:.2f}"
    assert shown["teacher"]["ours AP, last evaluation, %"] == "40.00 (1)"


def write(directory, *, done=True, **config):
    """A fabricated work directory."""
    directory.mkdir(parents=True)
    config = config_lib.resolve(resolved(**config))
    (directory / "config.json").write_text(config_lib.to_json(config))
    if done:
        (directory / "result.json").write_text(json.dumps({"student_top1": 1.0, "config": config.to_dict()}))
    return config


def test_runs_are_found_by_what_they_compute(tmp_path):
    config = write(tmp_path / "runs" / "b", seed=3)
    write(tmp_path / "runs" / "a", seed=4, done=False)
    write(tmp_path / "mine", epochs=2)
    (tmp_path / "runs" / "damaged").mkdir()
    (tmp_path / "runs" / "damaged" / "result.json").write_text("{")
    (tmp_path / "runs" / "foreign").mkdir()
    (tmp_path / "runs" / "foreign" / "config.json").write_text("{}")
    (tmp_path / "runs" / "link").symlink_to(tmp_path / "mine")
    said = []
    found = runs.search([tmp_path / "runs", tmp_path / "mine", tmp_path / "nowhere"], said.append)
    assert [run.workdir.name for run in found] == ["a", "b", "link"]  # mine once, under the name met first
    assert [run.result is None for run in found] == [True, False, False]
    assert len(said) == 2 and "damaged" in said[0] and "not of a run of this version" in said[1]
    assert runs.key(found[1].config) == runs.key(config) != runs.key(found[0].config)
    assert runs.key(found[0].config, seeds=False) == runs.key(config, seeds=False)
    assert runs.key(found[2].config, seeds=False) != runs.key(config, seeds=False)


def test_where_and_how_it_ran_makes_no_other_run_and_a_teachers_seed_does():
    def taught(teacher_seed, **settings):
        return config_lib.resolve(
            resolved(methods={"kd": {}}, teacher={"train": resolved(seed=teacher_seed)}, **settings)
        )

    assert runs.key(taught(0)) == runs.key(taught(0, log_every=3))
    assert runs.key(taught(0)) != runs.key(taught(1))
    assert runs.key(taught(0), seeds=False) == runs.key(taught(1, seed=5), seeds=False)


def test_milliseconds_a_step_leave_out_evaluations_compilation_and_pauses():
    times = {1: 100.0, 3: 100.2, 5: 107.4, 7: 107.6, 9: 107.8, 11: 907.8}  # evaluated after 3, stopped after 9
    lines = [{"kind": "train", "step": step, "time": time} for step, time in times.items()]
    lines.insert(2, {"kind": "eval", "step": 4, "time": 107.2})
    assert runs._step_milliseconds(lines) == pytest.approx(100.0)
    assert runs._step_milliseconds(lines[:1]) is None


def test_a_published_table_beside_the_runs_found():
    table = Table(
        "setting",
        "a paper",
        [
            Row("teacher", 73.31, teacher=True),
            Row("KD", 71.03, (90.05,), config="f:kd"),
            Row("ours", 72.5, spread=0.1, config="f:ours"),
            Row("closed", 72.17),
        ],
    )
    found = {"KD": [run for run in entries() if run.method == "kd" and run.result]}
    found["KD"].append(compare.Entry("KD", 5, "x", "unfinished"))
    page = compare.published(table, "command", found, {"KD": "make kd", "ours": "make ours"}, ["a note"])
    shown = rows(page)
    assert shown["teacher"]["ours top-1, last epoch, %"] == "98.00 (1)"
    kd = shown["KD"]
    assert (kd["paper top-1, %"], kd["paper top-5, %"]) == ("71.03", "90.05")
    mean, spread = np.mean(TOP1["kd"][:2]), np.std(TOP1["kd"][:2], ddof=1)
    assert kd["ours top-1, last epoch, %"] == f"{mean:.2f} ± {spread:.2f} (2)"
    assert kd["ours top-1, best epoch, %"] == f"{mean + 0.5:.2f} ± {spread:.2f} (2)"
    assert (kd["ours top-5, %"], kd["runs"], kd["command"]) == ("99.00", "2, 1 unfinished", "`make kd`")
    assert shown["ours"]["paper top-1, %"] == "72.50 ± 0.10"
    assert (shown["ours"]["ours top-1, last epoch, %"], shown["ours"]["runs"]) == ("–", "0")
    assert (shown["closed"]["runs"], shown["closed"]["command"]) == ("–", "–")
    assert "- a note\n" in page and "- Paper: a paper\n" in page


# Copied from the paper's tables, not from published.py.
@pytest.mark.parametrize(
    ("table", "row", "numbers", "method"),
    [
        ("imagenet_r34_r18", "teacher", (73.31, 91.42, None), None),
        ("imagenet_r34_r18", "ReviewKD", (71.61, 90.51, None), "baselines:pair=r34_r18,method=reviewkd"),
        ("imagenet_r34_r18", "CRD + KD", (71.38, 90.49, None), "baselines:pair=r34_r18,method=crd+kd"),
        ("imagenet_r34_r18", "KD-Zero", (72.17, 90.46, None), None),
        ("imagenet_r34_r18", "WKD-L + WKD-F", (72.76, 91.08, None), "imagenet_wkd:pair=r34_r18,method=wkd_l+wkd_f"),
        ("imagenet_r50_mv1", "NKD", (72.58, None, None), "baselines:pair=r50_mv1,method=nkd"),
        ("imagenet_r50_mv1", "WKD-F", (73.12, 91.39, None), "imagenet_wkd:pair=r50_mv1,method=wkd_f"),
        ("cifar100_vit_s_mv2", "DKD", (69.80, None, None), "cross:pair=vit_s_mv2,method=dkd"),
        ("cifar100_swin_t_r18", "WKD-F", (81.57, None, 0.12), "cross:pair=swin_t_r18,method=wkd_f"),
        ("cifar100_convnext_t_swin_p", "FitNet", (24.06, None, None), "cross:pair=convnext_t_swin_p,method=fitnet"),
        ("cifar100_convnext_t_deit_t", "WKD-L", (76.11, None, 0.18), "cross:pair=convnext_t_deit_t,method=wkd_l"),
        ("cifar100_vit_s_r18", "CRD", (76.60, None, None), "cross:pair=vit_s_r18,method=crd"),
        ("cifar100_wrn40_2_snv1", "WKD-F", (77.36, None, None), "cifar100_wkd:pair=wrn40_2_snv1,method=wkd_f"),
        ("imagenet_selfkd", "WKD-L", (71.35, None, None), "imagenet_selfkd:method=wkd_l"),
    ],
)
def test_published_numbers(table, row, numbers, method):
    (found,) = [each for each in TABLES[table].rows if each.name == row]
    assert (found.value, next(iter(found.more), None), found.spread) == numbers
    assert found.config is None if method is None else found.config.endswith(method)


@pytest.mark.parametrize(
    ("table", "row", "numbers"),
    [
        ("coco_r101_r18", "student", (33.26, 53.61, 35.26)),
        ("coco_r101_r18", "FCFD", (37.37, 57.60, 40.34)),
        ("coco_r101_r50", "teacher", (42.04, 62.48, 45.88)),
        ("coco_r101_r50", "DKD + ReviewKD", (40.65, 61.51, 44.44)),
        ("coco_r50_mv2", "teacher", (40.22, 61.02, 43.81)),
        ("coco_r50_mv2", "FitNet", (30.20, 49.80, 31.69)),
    ],
)
def test_published_numbers_of_detectors(table, row, numbers):
    (found,) = [each for each in TABLES[table].rows if each.name == row]
    assert (found.value, *found.more) == numbers
    assert found.teacher == (row == "teacher")


def test_published_tables_are_whole():
    assert {name: len(table.rows) for name, table in TABLES.items()} == {
        "imagenet_r34_r18": 20,
        "imagenet_r50_mv1": 16,
        "imagenet_selfkd": 7,
        "cifar100_r32x4_r8x4": 20,
        "cifar100_wrn40_2_snv1": 17,
        **{
            f"cifar100_{pair}": 12
            for pair in ("swin_t_r18", "vit_s_r18", "vit_s_mv2", "convnext_t_deit_t", "convnext_t_swin_p")
        },
        "coco_r101_r18": 14,
        "coco_r101_r50": 8,
        "coco_r50_mv2": 14,
    }
    for table in TABLES.values():
        assert all(len(row.more) <= len(table.metric.more) for row in table.rows)
        assert len({row.name for row in table.rows}) == len(table.rows)
