"""Metrics against brute force over random matrices, published rows, and hand-made streams."""

import copy
import json
import math
import random

import pytest

from mcit.data_prep.errors import InputError
from mcit.eval.metrics import continual_metrics, metrics_file

NAMES = {"MFT", "MFN", "AP", "MAA", "BWT", "BWT_over_T", "FWT", "forgetting"}


def brute_force(matrix, learned, row0):
    """The definitions, with P[k, i] for stages k = 1…K (0: the base) and tasks i = 1…N; None if undefined."""
    stages, tasks = len(matrix) - row0, len(matrix[-1])
    first = 0 if row0 else 1
    P = {(k, i): matrix[k - first][i - 1] for k in range(first, stages + 1) for i in range(1, tasks + 1)}
    L = {i: learned[i - 1] for i in range(1, tasks + 1)}
    T, K = tasks, stages
    old = [i for i in L if L[i] < K]
    later = [i for i in L if L[i] > 1]

    def attempt(compute):
        try:
            return compute()
        except (TypeError, ZeroDivisionError, KeyError):
            return None

    def maa():
        total, count = 0, 0
        for k in range(1, K + 1):
            seen = [i for i in L if L[i] <= k]
            if seen:
                total, count = total + sum(P[k, i] for i in seen) / len(seen), count + 1
        return total / count

    return {
        "MFT": attempt(lambda: sum(P[L[i], i] for i in L) / T),
        "MFN": attempt(lambda: sum(P[K, i] for i in L) / T),
        "AP": attempt(lambda: sum(P[K, i] for i in L) / T),
        "MAA": attempt(maa),
        "BWT": attempt(lambda: sum(P[K, i] - P[L[i], i] for i in old) / len(old)),
        "BWT_over_T": attempt(lambda: sum(P[K, i] - P[L[i], i] for i in old) / T if old else None),
        "FWT": attempt(lambda: sum(P[L[i] - 1, i] - P[0, i] for i in later) / len(later)),
        "forgetting": attempt(lambda: sum(max(P[k, i] for k in range(L[i], K)) - P[K, i] for i in old) / len(old)),
    }


def test_brute_force_over_random_streams():
    rng = random.Random(0)
    for _ in range(2000):
        stages, tasks, row0 = rng.randint(1, 6), rng.randint(1, 6), rng.random() < 0.5
        holes = rng.choice([0, 0, 0.1])
        matrix = [
            [None if rng.random() < holes else rng.uniform(0, 100) for _ in range(tasks)] for _ in range(stages + row0)
        ]
        learned = [rng.randint(1, stages) for _ in range(tasks)]
        before = copy.deepcopy((matrix, learned))
        found = continual_metrics(matrix, learned, row0)
        assert found == pytest.approx(brute_force(matrix, learned, row0))
        assert (matrix, learned) == before
        assert set(found) == NAMES


def test_the_usual_formulas_where_each_stage_learns_one_task():
    rng = random.Random(1)
    for T in (2, 3, 5):
        P = [[rng.uniform(0, 100) for _ in range(T)] for _ in range(T + 1)]
        found = continual_metrics(P, row0=True)
        last = P[T]
        assert found == pytest.approx(
            {
                "MFT": sum(P[i + 1][i] for i in range(T)) / T,
                "MFN": sum(last) / T,
                "AP": sum(last) / T,
                "MAA": sum(sum(P[k][:k]) / k for k in range(1, T + 1)) / T,
                "BWT": sum(last[i] - P[i + 1][i] for i in range(T - 1)) / (T - 1),
                "BWT_over_T": sum(last[i] - P[i + 1][i] for i in range(T - 1)) / T,
                "FWT": sum(P[i][i] - P[0][i] for i in range(1, T)) / (T - 1),
                "forgetting": sum(max(P[k][i] for k in range(i + 1, T)) - last[i] for i in range(T - 1)) / (T - 1),
            }
        )
        assert found["BWT_over_T"] == pytest.approx(found["MFN"] - found["MFT"])
        assert found["forgetting"] >= -found["BWT"] - 1e-9


def test_mammoth_example():
    found = continual_metrics([[90], [60, 80], [50, 70, 85]])
    assert found["forgetting"] == pytest.approx(25)
    assert found["BWT"] == pytest.approx(-25)
    assert found["MFT"] == pytest.approx(85)
    assert found["MFN"] == found["AP"] == pytest.approx(205 / 3)
    assert found["MAA"] == pytest.approx((90 + 70 + 205 / 3) / 3)
    assert found["FWT"] is None


@pytest.mark.parametrize(
    ("final", "mft", "mfn", "bwt"),
    [  # MLLM-DCL, LLaVA-1.5-7B: RS, Med, AD, Sci, Fin after the last stage
        ([77.26, 50.37, 37.21, 40.87, 86.82], 65.01, 58.51, -8.13),  # SEFE
        ([69.65, 41.59, 25.43, 40.88, 87.45], 64.98, 53.00, -14.97),  # LoRA fine-tuning
    ],
)
def test_published_rows_divide_by_tasks_minus_one(final, mft, mfn, bwt):
    fresh = [(5 * mft - final[-1]) / 4] * 4 + [final[-1]]  # any diagonal with this mean, same last cell
    matrix = [[fresh[i] if k == i else None for i in range(5)] for k in range(4)] + [final]
    found = continual_metrics(matrix)
    assert found["MFT"] == pytest.approx(mft, abs=0.005)
    assert found["MFN"] == pytest.approx(mfn, abs=0.005)
    assert found["BWT"] == pytest.approx(bwt, abs=0.01)
    assert found["BWT_over_T"] == pytest.approx(mfn - mft, abs=0.01)
    assert found["MAA"] is None and found["forgetting"] is None  # those need the cells that were not given


def test_row_0_may_be_whole_above_lower_triangular_rows():
    rows = [[10, 20], [80], [60, 90]]
    assert continual_metrics(rows, row0=True)["BWT"] == -20
    assert continual_metrics(rows, row0=True)["FWT"] is None  # stage 1 was not evaluated on task 1


def test_forgetting_counts_from_the_best_score_not_from_the_first():
    found = continual_metrics([[50, 0, 0], [70, 60, 0], [40, 50, 90]])
    assert found["forgetting"] == pytest.approx((30 + 10) / 2)
    assert found["BWT"] == pytest.approx((-10 - 10) / 2)


def test_one_task_has_nothing_to_forget():
    found = continual_metrics([[10.0], [80.0]], row0=True)
    assert found == {
        "MFT": 80,
        "MFN": 80,
        "AP": 80,
        "MAA": 80,
        "BWT": None,
        "BWT_over_T": None,
        "FWT": None,
        "forgetting": None,
    }


def test_a_run_s_captions_may_be_worth_more_than_100(tmp_path):
    """MCITlib's protocol counts CIDEr × 100 into its mean."""
    with pytest.raises(InputError, match=r"matrix\[0\]\[0\]: is 120"):
        continual_metrics([[120]])
    assert continual_metrics([[120]], most=math.inf)["MFN"] == 120
    (tmp_path / "m.json").write_text('{"matrix": [[120]], "schema_version": 1, "learned": {"a": 1}}')
    assert metrics_file(tmp_path / "m.json")["MFN"] == 120
    (tmp_path / "m.json").write_text('{"matrix": [[20]], "schema_version": 1, "learned": {"a": 1}, "curves": {}}')
    with pytest.raises(InputError, match="curves: is not what"):
        metrics_file(tmp_path / "m.json")


def test_tasks_learned_together_and_tasks_that_come_back():
    joint = continual_metrics([[70, 90]], learned=[1, 1])
    assert joint["MFT"] == joint["MFN"] == joint["MAA"] == 80
    assert joint["BWT"] is None
    # task 0, then task 1, then task 0 again: no task is new in the last stage, so both are old
    again = continual_metrics([[80, 0], [50, 60], [85, 40]], learned=[1, 2])
    assert again["BWT"] == pytest.approx((5 - 20) / 2)
    assert again["BWT_over_T"] == pytest.approx((5 - 20) / 2)
    assert again["forgetting"] == pytest.approx((-5 + 20) / 2)


def test_zero_shot_transfer_needs_row_0():
    matrix = [[10, 20, 30], [90, 40, 25], [80, 95, 35], [70, 85, 90]]
    assert continual_metrics(matrix, row0=True)["FWT"] == pytest.approx((20 + 5) / 2)
    assert continual_metrics(matrix[1:])["FWT"] is None


@pytest.mark.parametrize(
    ("cell", "undefined"),
    [
        ((0, 0), {"MFT", "MAA", "BWT", "BWT_over_T", "forgetting"}),
        ((1, 0), {"MAA", "forgetting"}),
        ((2, 0), {"MFN", "AP", "MAA", "BWT", "BWT_over_T", "forgetting"}),
        ((2, 2), {"MFT", "MFN", "AP", "MAA"}),
        ((0, 2), set()),
    ],
)
def test_a_hole_undoes_only_what_needs_it(cell, undefined):
    matrix = [[90, 10, 10], [60, 80, 10], [50, 70, 85]]
    matrix[cell[0]][cell[1]] = None
    found = continual_metrics(matrix)
    assert {name for name, value in found.items() if value is None} == undefined | {"FWT"}


@pytest.mark.parametrize(
    ("matrix", "learned", "message"),
    [
        ([], None, "matrix"),
        ([[]], None, "matrix"),
        ({}, None, "matrix"),
        ([1, 2], None, "matrix"),
        (["12"], None, "matrix"),
        ([[1, 2], [3]], None, r"matrix\[1\]: has 1 cells"),
        ([[1, float("nan")], [3, 4]], None, r"matrix\[0\]\[1\]: is nan"),
        ([[1, 2], [3, float("inf")]], None, r"matrix\[1\]\[1\]"),
        ([[1, 2], [3, 100.5]], None, r"matrix\[1\]\[1\]: is 100.5"),
        ([[1, 2], [-1, 4]], None, r"matrix\[1\]\[0\]: is -1"),
        ([[1, 2], [True, 4]], None, r"matrix\[1\]\[0\]: is True"),
        ([[1, 2], ["3", 4]], None, r"matrix\[1\]\[0\]: is '3'"),
        ([[1, 2, 3], [4, 5, 6]], None, "learned: is needed: 3 tasks and 2 stages"),
        ([[1, 2], [3, 4]], [1], "learned: must give"),
        ([[1, 2], [3, 4]], [1, 3], r"learned\[1\]: is 3"),
        ([[1, 2], [3, 4]], [0, 1], r"learned\[0\]: is 0"),
        ([[1, 2], [3, 4]], [1, 1.5], r"learned\[1\]: is 1.5"),
        ([[1, 2], [3, 4]], [1, True], r"learned\[1\]: is True"),
        ([[1, 2], [3, 4]], "12", "learned: must give"),
    ],
)
def test_wrong_input(matrix, learned, message):
    with pytest.raises(InputError, match=message):
        continual_metrics(matrix, learned)


def test_row_0_alone_is_no_stage():
    with pytest.raises(InputError):
        continual_metrics([[1.0, 2.0]], row0=True)


# --- Files ----------------------------------------------------------------------------------------------------------


def write(tmp_path, content):
    path = tmp_path / "matrix.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_metrics_file(tmp_path):
    rows = [[10, 20], [80, 30], [60, 90]]
    expected = continual_metrics(rows, row0=True)
    assert metrics_file(write(tmp_path, {"matrix": rows, "row0": True})) == expected
    assert metrics_file(write(tmp_path, {"matrix": rows, "row0": True, "learned": [1, 2]})) == expected
    assert metrics_file(write(tmp_path, {"matrix": rows, "row0": True, "learned": {"a": 1, "b": 2}})) == expected
    swapped = {"matrix": rows, "row0": True, "learned": {"b": 2, "a": 1}, "tasks": ["a", "b"]}
    assert metrics_file(write(tmp_path, swapped)) == expected
    results = {**swapped, "schema_version": 1, "tasks": [{"name": "a", "n": 3}, {"name": "b", "n": 3}], "name": "run"}
    assert metrics_file(write(tmp_path, results)) == expected
    assert json.loads(json.dumps(expected, allow_nan=False)) == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[[1]]", "has no matrix"),
        ("{", "malformed JSON"),
        ('{"matrix": [[NaN]]}', r"matrix\[0\]\[0\]: is nan"),
        ({"matrix": [[1]], "row_0": True}, "row_0: unknown key"),
        ({"matrix": [[1]], "row0": 1}, "row0: must be true or false"),
        ({"matrix": [[1]], "learned": {"a": 1}, "tasks": ["b"]}, "learned: names other tasks"),
        ({"matrix": [[1]], "learned": {"a": 1}, "tasks": 3}, "tasks: must list"),
        ({"matrix": [[1]], "learned": 3}, "learned: must give"),
    ],
)
def test_wrong_file(tmp_path, content, message):
    with pytest.raises(InputError, match=message) as error:
        metrics_file(write(tmp_path, content))
    assert "matrix.json" in str(error.value)
