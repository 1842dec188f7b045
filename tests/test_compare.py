"""Differences between runs: the point as in the results, the interval as by hand, images drawn as a whole."""

import random
from pathlib import Path

import numpy as np
import pytest

from mcit.data_prep.files import read_jsonl, write_json, write_jsonl
from mcit.eval.compare import RESAMPLES, compare_members, compare_runs
from mcit.eval.metrics import continual_metrics

ORDER = ["a", "b", "c"]


def write_run(folder: Path, seed: int, *, order: list[str] = ORDER, n: int = 40, per_image: int = 4, lift: float = 0):
    """A run with random scores of 0 and 100; `lift` makes 100 likelier for every other image."""
    rng, stages = random.Random(seed), range(len(order) + 1)
    matrix = []
    for stage in stages:
        row = []
        for task in ORDER:
            rows = []
            for i in range(n):
                score = 100 * (rng.random() < 0.3 + lift * (i // per_image % 2))
                image = f"{task}-{i // per_image}" if per_image > 1 else None
                rows.append({"id": f"{task}-{i}", "references": ["x"], "score": score, "image_id": image})
            write_jsonl(folder / "predictions" / f"{stage:02d}" / f"{task}.jsonl", rows)
            row.append(sum(r["score"] for r in rows) / n)
        matrix.append(row)
    learned = {task: order.index(task) + 1 for task in ORDER}
    results = {key: {} for key in ("method", "hashes", "versions", "seconds")}
    results |= {key: [] for key in ("stderr", "n", "verdicts")}
    results |= {"schema_version": 1, "name": folder.name, "seed": seed, "matrix": matrix, "row0": True}
    results |= {"tasks": [{"name": task} for task in ORDER], "stages": [{"k": k, "name": "s"} for k in stages]}
    results |= {"learned": learned, "metrics": continual_metrics(matrix, list(learned.values()), row0=True)}
    write_json(folder / "results.json", results)
    return results


@pytest.mark.parametrize("order", [ORDER, ["c", "a", "b"]])
def test_the_point_is_the_difference_of_the_results(tmp_path, order):
    one = write_run(tmp_path / "one", 0)
    two = write_run(tmp_path / "two", 1, order=order, lift=0.4)
    found = compare_runs(tmp_path / "one", tmp_path / "two")
    for i, task in enumerate(ORDER):
        assert found["tasks"][task]["difference"] == pytest.approx(two["matrix"][-1][i] - one["matrix"][-1][i])
        assert found["tasks"][task]["n"] == 40
    for metric in ("MFN", "BWT"):
        expected = two["metrics"][metric] - one["metrics"][metric]
        assert found[metric]["difference"] == pytest.approx(expected)
        assert found[metric]["low"] < expected < found[metric]["high"]
    assert found == compare_runs(tmp_path / "one", tmp_path / "two"), "the same again"


def test_a_score_of_all_answers_together_is_no_mean_to_compare(tmp_path):
    """BLEU over a test set is not the mean of its sentences'."""
    for n, name in enumerate(("one", "two")):
        results = write_run(tmp_path / name, n)
        results["matrix"][-1][0] += 1
        write_json(tmp_path / name / "results.json", results)
    found = compare_runs(tmp_path / "one", tmp_path / "two")
    assert found["tasks"]["a"] is None and found["MFN"] is None and found["tasks"]["b"] is not None


def rows_of(folder: Path, stage: int, task: str) -> list[float]:
    return [row["score"] for row in read_jsonl(folder / "predictions" / f"{stage:02d}" / f"{task}.jsonl")]


def test_intervals_are_those_of_a_bootstrap_written_out(tmp_path):
    write_run(tmp_path / "one", 0)
    write_run(tmp_path / "two", 1, lift=0.4)
    found, rng = compare_runs(tmp_path / "one", tmp_path / "two"), np.random.default_rng(5)
    difference = {
        task: [b - a for a, b in zip(*(rows_of(tmp_path / run, 3, task) for run in ("one", "two")), strict=True)]
        for task in ORDER
    }
    draws = {task: [] for task in ORDER}
    for _ in range(4000):
        for task in ORDER:
            images = rng.integers(0, 10, 10)
            sample = [difference[task][4 * image + j] for image in images for j in range(4)]
            draws[task].append(sum(sample) / 40)
    for task in ORDER:
        low, high = np.percentile(draws[task], [2.5, 97.5])
        assert (found["tasks"][task]["low"], found["tasks"][task]["high"]) == pytest.approx((low, high), abs=2.6)
    low, high = np.percentile(np.mean([draws[task] for task in ORDER], axis=0), [2.5, 97.5])
    assert (found["MFN"]["low"], found["MFN"]["high"]) == pytest.approx((low, high), abs=1.5)
    assert RESAMPLES > 4000


def width(found) -> float:
    return found["MFN"]["high"] - found["MFN"]["low"]


def test_images_are_drawn_whole_and_runs_are_paired(tmp_path):
    """Ten images of four questions say less than forty of one; and a run does not differ from itself at all."""
    for name, seed in (("one", 0), ("two", 1)):
        write_run(tmp_path / "clustered" / name, seed, lift=0.6 * seed)
        write_run(tmp_path / "single" / name, seed, lift=0.6 * seed, per_image=1)
    folders = [tmp_path / kind for kind in ("clustered", "single")]
    clustered, single = (compare_runs(folder / "one", folder / "two") for folder in folders)
    assert width(clustered) > 1.1 * width(single)
    same = compare_runs(tmp_path / "single" / "one", tmp_path / "single" / "one")
    assert same["MFN"] == {"difference": 0, "low": 0, "high": 0, "n": 120}
    assert same["BWT"]["difference"] == same["BWT"]["low"] == same["BWT"]["high"] == 0


def test_only_what_both_answered_is_compared(tmp_path):
    write_run(tmp_path / "one", 0)
    write_run(tmp_path / "two", 1, n=20)
    found = compare_runs(tmp_path / "one", tmp_path / "two")
    assert {task["n"] for task in found["tasks"].values()} == {20} and found["MFN"]["n"] == 60


def test_what_is_not_there_is_null(tmp_path):
    write_run(tmp_path / "one", 0)
    results = write_run(tmp_path / "two", 1)
    results["matrix"][3][0] = None
    write_json(tmp_path / "two" / "results.json", results)
    found = compare_runs(tmp_path / "one", tmp_path / "two")
    assert found["tasks"]["a"] is found["MFN"] is found["BWT"] is None and found["tasks"]["b"] is not None
    results["tasks"][2]["name"] = "other"
    results["learned"] = {"a": 1, "b": 2, "other": 3}
    write_json(tmp_path / "two" / "results.json", results)
    found = compare_runs(tmp_path / "one", tmp_path / "two")
    assert set(found["tasks"]) == {"a", "b"} and found["MFN"] is None


def test_one_image_gives_no_interval(tmp_path):
    for name, seed in (("one", 0), ("two", 1)):
        write_run(tmp_path / name, seed, per_image=40)
    found = compare_runs(tmp_path / "one", tmp_path / "two")["tasks"]["a"]
    assert found["low"] is found["high"] is None and found["n"] == 40


def test_sweeps_are_paired_by_the_runs_they_share():
    first = {"seed-0": {"MFN": 50.0, "FWT": None}, "seed-1": {"MFN": 70.0, "FWT": 1.0}, "seed-2": {"MFN": 10.0}}
    second = {"seed-1": {"MFN": 73.0, "FWT": None}, "seed-0": {"MFN": 52.0, "FWT": 1.0}, "seed-7": {"MFN": 99.0}}
    found = compare_members(first, second)
    assert set(found) == {"MFN"} and (found["MFN"]["mean"], found["MFN"]["n"]) == (2.5, 2)
    assert found["MFN"]["high"] == pytest.approx(2.5 + 12.7062 * 0.5)  # t of one degree of freedom, from a table
