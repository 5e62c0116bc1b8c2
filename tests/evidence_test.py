"""The experiment of docs/evidence.md: its protocol, and that the page has the tables of the committed results."""

import json
import math
import pathlib

import numpy as np
import pytest

from benchmarks import evidence
from wkd_jax import config_file

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "evidence.md"
DONE = [name for name in evidence.SETTINGS if (evidence.RESULTS / f"evidence_{name}.json").exists()]


@pytest.mark.parametrize("name", evidence.SETTINGS)
def test_every_row_is_tuned_alike(name):
    setting = evidence.SETTINGS[name]
    for row, (method, shared) in setting.rows.items():
        trials = evidence.trials(setting, row)
        assert len({*trials}) == len(setting.factors) == 3
        assert all(set(shared) <= set(trial) for trial in trials)
        first, second = ({item.split("=")[0]: item.split("=")[1] for item in trial} for trial in trials[:2])
        varied = {key for key in first if first[key] != second[key]}
        assert varied and all(
            float(second[key]) / float(first[key]) == pytest.approx(setting.factors[1] / setting.factors[0], rel=1e-5)
            for key in varied
        )
        config = config_file.load_config(evidence._argument(setting, method, 0, "validation"), trials[0][len(shared) :])
        assert "validation" in config.name


@pytest.mark.parametrize("name", DONE)
def test_page_has_the_table_of_the_results(name):
    assert evidence.table(name) in PAGE.read_text()


@pytest.mark.parametrize("name", DONE)
def test_results_follow_the_protocol(name):
    rows = json.loads((evidence.RESULTS / f"evidence_{name}.json").read_text())["rows"]
    assert [*rows] == [*evidence.SETTINGS[name].rows]
    for row, found in rows.items():
        assert [*found["validation"]] == ["; ".join(trial) for trial in evidence.trials(evidence.SETTINGS[name], row)]
        assert found["chosen"] == max(found["validation"], key=found["validation"].__getitem__)
        assert len(found["test"]) == len(evidence.SEEDS) == 5


def test_mean_and_standard_error():
    values = [3.0, 5.0, 4.0, 8.0]
    error = np.std(values, ddof=1) / math.sqrt(4)
    assert evidence._mean_error(values) == f"5.00 ± {error:.2f}"
    assert evidence._mean_error([-v for v in values], signed=True) == f"−5.00 ± {error:.2f}"
