"""Intervals of a run's metrics over other test samples."""

import math

import numpy as np
import pytest

from mcit.data_prep.files import write_jsonl
from mcit.eval.intervals import metric_intervals


def write_cell(run, k, task, scores, images=None):
    rows = [{"id": f"{i}", "score": score, "image_id": images and images[i]} for i, score in enumerate(scores)]
    write_jsonl(run / "predictions" / f"{k:02d}" / f"{task}.jsonl", rows)


def test_the_interval_of_a_mean_is_that_of_its_standard_error(tmp_path):
    """One task, one stage: MFN is the mean of 0-or-100 scores, whose interval is known in closed form."""
    scores = np.random.default_rng(0).permutation([100.0] * 240 + [0.0] * 160)
    write_cell(tmp_path, 1, "a", scores)
    found = metric_intervals(tmp_path, ["a"], [[None], [60.0]], [1])
    half = 1.96 * 100 * math.sqrt(0.6 * 0.4 / 400)
    assert found["MFN"]["low"] == pytest.approx(60 - half, abs=0.7)
    assert found["MFN"]["high"] == pytest.approx(60 + half, abs=0.7)
    assert "BWT" not in found, "undefined"


def test_questions_on_one_image_widen_it(tmp_path):
    scores = [100.0] * 100 + [0.0] * 100
    write_cell(tmp_path, 1, "a", scores)
    alone = metric_intervals(tmp_path, ["a"], [[None], [50.0]], [1])["MFN"]
    write_cell(tmp_path, 1, "a", scores, images=[str(i // 10) for i in range(200)])
    shared = metric_intervals(tmp_path, ["a"], [[None], [50.0]], [1])["MFN"]
    ratio = (shared["high"] - shared["low"]) / (alone["high"] - alone["low"])
    assert ratio == pytest.approx(math.sqrt(10), rel=0.15)


def test_stages_are_resampled_together(tmp_path):
    """What is lost on every sample alike has no spread, however much the scores vary between samples."""
    scores = np.array([80.0, 20.0] * 50)
    write_cell(tmp_path, 1, "a", scores)
    write_cell(tmp_path, 2, "a", scores - 20)
    write_cell(tmp_path, 2, "b", scores)
    found = metric_intervals(tmp_path, ["a", "b"], [[None, None], [50.0, None], [30.0, 50.0]], [1, 2])
    assert found["BWT"] == {"low": pytest.approx(-20), "high": pytest.approx(-20)}
    assert found["MFT"]["high"] - found["MFT"]["low"] > 5


def test_a_score_that_is_no_mean_over_answers_has_none(tmp_path):
    write_cell(tmp_path, 1, "a", [10.0, 30.0])
    assert metric_intervals(tmp_path, ["a"], [[None], [25.0]], [1]) == {}


def test_predictions_that_are_not_there_leave_it_out(tmp_path):
    assert metric_intervals(tmp_path, ["a"], [[None], [25.0]], [1]) == {}
