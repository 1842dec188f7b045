"""`results.json` from the markers of a run."""

import json

import pytest

from mcit.data_prep.errors import InputError
from mcit.data_prep.files import write_json, write_jsonl
from mcit.eval.gathering import assemble_results
from mcit.eval.metrics import continual_metrics, metrics_file
from mcit.eval.results import read_results, write_results
from mcit.eval.serving import Serving, write_serving

TASKS = {"digits": "short", "counting": "mcq"}
STAGES = [{"k": 1, "name": "digits", "tasks": ["digits"]}, {"k": 2, "name": "counting", "tasks": ["counting"]}]
SCORES = [[10, 25], [90, 30], [40, 80]]
VERDICTS = {"correct": 0.5, "wrong_content": 0.5, "wrong_format": 0.0, "wrong_both": 0.0}


@pytest.fixture
def run(tmp_path):
    """A finished run, as its steps leave it."""
    for task, style in TASKS.items():
        info = {"name": task, "style": style, "reasoning": "none", "scorer": style, "reward": "same", "image_root": "."}
        info |= {"counts": {"train": 9, "test": 4}, "notes": [], "hash": f"data-{task}", "test_hash": f"test-{task}"}
        write_json(tmp_path / "data" / task / "task.json", info)
    for k, name in enumerate(["base", *TASKS]):
        folder = tmp_path / "stages" / f"{k:02d}-{name}"
        kind = "adapter" if k else "base"
        write_serving(folder, Serving(stage=k, name=name, kind=kind, base="b", base_hash="h0", hash=f"h{k}"))
        write_json(folder / "done.json", {"fingerprint": "f", "seconds": 10.0 * k})
        for i, task in enumerate(TASKS):
            write_cell(tmp_path, k, task, SCORES[k][i])
    return tmp_path


def write_cell(run_dir, k, task, score, **changes):
    marker = {"fingerprint": "f", "n": 4, "score": score, "stderr": 1.5, "verdicts": VERDICTS, "engine": "vllm"}
    marker |= {"policy_hash": f"h{k}", "data_hash": f"test-{task}", "seconds": 0.5} | changes
    write_json(run_dir / "predictions" / f"{k:02d}" / f"{task}.done.json", marker)


def assemble(run_dir, **changes):
    arguments = {"name": "mini", "seed": 3, "method": {"replay": {"size": 9}}, "stages": STAGES}
    return assemble_results(run_dir, **arguments | {"learned": {"digits": 1, "counting": 2}} | changes)


def test_a_finished_run(run):
    results = assemble(run, recipe_hash="r")
    assert results["matrix"] == SCORES
    assert results["row0"] is True
    assert results["tasks"] == [
        {"name": "digits", "style": "short", "scorer": "short", "n": 4},
        {"name": "counting", "style": "mcq", "scorer": "mcq", "n": 4},
    ]
    assert [(stage["k"], stage["name"], stage["tasks"]) for stage in results["stages"]] == [
        (0, "base", []),
        (1, "digits", ["digits"]),
        (2, "counting", ["counting"]),
    ]
    assert results["stderr"] == [[1.5, 1.5]] * 3 and results["n"] == [[4, 4]] * 3
    assert results["verdicts"] == [[VERDICTS] * 2] * 3
    assert results["metrics"] == continual_metrics(SCORES, row0=True)
    assert results["hashes"] == {
        "recipe": "r",
        "data": {"digits": "data-digits", "counting": "data-counting"},
        "policies": ["h0", "h1", "h2"],
    }
    assert results["seconds"] == {"train": [0, 10, 20], "evaluate": [[0.5, 0.5]] * 3, "total": 33.0}
    assert {"python", "mcit", "torch", "transformers"} <= set(results["versions"])
    assert (results["name"], results["seed"], results["method"]) == ("mini", 3, {"replay": {"size": 9}})
    assert results["learned"] == {"digits": 1, "counting": 2}


def test_written_and_read_back(run):
    results = assemble(run)
    write_results(run, results)
    assert read_results(run) == results
    assert metrics_file(run / "results.json") == results["metrics"]


def test_what_is_not_done_is_null(run):
    (run / "predictions" / "02" / "digits.done.json").unlink()
    for file in ("serving.json", "done.json"):
        (run / "stages" / "01-digits" / file).unlink()
    results = assemble(run)
    assert results["matrix"] == [[10, 25], [None, None], [None, 80]]
    assert results["n"] == [[4, 4], [None, None], [None, 4]]
    assert results["verdicts"][2] == [None, VERDICTS]
    assert results["hashes"]["policies"] == ["h0", None, "h2"]
    assert results["seconds"]["train"] == [0, None, 20]
    assert results["metrics"]["MFN"] is None
    json.dumps(results, allow_nan=False)


@pytest.mark.parametrize("changes", [{"policy_hash": "another adapter"}, {"data_hash": "another test set"}])
def test_a_cell_left_over_from_another_recipe_does_not_count(run, changes):
    write_cell(run, 2, "digits", 99, **changes)
    assert assemble(run)["matrix"][2] == [None, 80]


def test_a_mixed_stage_and_a_task_that_comes_back(run):
    stages = [{"k": 1, "name": "digits+counting", "tasks": ["digits", "counting"]}, {**STAGES[0], "k": 2}]
    for k, name in ((1, "digits+counting"), (2, "digits")):
        write_serving(
            run / "stages" / f"{k:02d}-{name}",
            Serving(stage=k, name=name, kind="adapter", base="b", base_hash="h0", hash=f"h{k}"),
        )
    results = assemble(run, stages=stages, learned={"digits": 1, "counting": 1})
    assert results["matrix"] == SCORES
    assert results["metrics"]["MFT"] == pytest.approx((90 + 30) / 2)
    assert results["metrics"]["BWT"] == pytest.approx((-50 + 50) / 2)


def test_broken_markers_are_named(run):
    path = run / "predictions" / "01" / "digits.done.json"
    write_json(path, {"fingerprint": "f", "n": 4})
    with pytest.raises(InputError, match=r"01/digits\.done\.json: score: is missing"):
        assemble(run)
    path.write_text("{")
    with pytest.raises(InputError, match="malformed JSON"):
        assemble(run)


def test_a_task_that_is_not_prepared(run):
    (run / "data" / "digits" / "task.json").unlink()
    with pytest.raises(InputError, match=r"digits/task\.json"):
        assemble(run)


def test_results_that_cannot_be_read(run):
    with pytest.raises(InputError, match="no results yet"):
        read_results(run)
    results = assemble(run)
    write_json(run / "results.json", {**results, "schema_version": 0})
    with pytest.raises(InputError, match="schema version 0"):
        read_results(run)
    del results["stderr"]
    write_json(run / "results.json", results)
    with pytest.raises(InputError, match="stderr: is missing"):
        read_results(run)


def held(known: float, n: int = 4) -> dict:
    return {"n": n, "score": 50 + known / 2, "shown": known, "known": known, "known_stderr": 1.0}


def answers(right: int, form: bool) -> list[dict]:
    """Four rows of a yes/no task, of which so many know the answer; shown only where the form is right."""
    return [
        {
            "id": i,
            "score": 100.0 * (form and i < right),
            "format_ok": form,
            "verdict": "correct" if form else "wrong_format",
            "constrained_score": 100.0 * (i < right),
            "chance": 0.5,
            "image_id": i,
        }
        for i in range(4)
    ]


def test_what_was_asked_beside_the_matrix_stands_beside_it(run):
    """Digits: known 100 → 50 (three of four right), shown 100 → 0. Counting has no form; facts is a general task."""
    info = {"name": "facts", "style": "short", "reasoning": "none", "scorer": "short", "reward": "same"}
    info |= {"image_root": ".", "counts": {"test": 4}, "notes": [], "hash": "data-facts", "test_hash": "test-facts"}
    write_json(run / "data" / "facts" / "task.json", info)
    for k, score in enumerate((90.0, 60.0, 30.0)):
        write_cell(run, k, "digits", SCORES[k][0], constrained=held((0, 100, 50)[k]), content=SCORES[k][0] + 5)
        write_cell(run, k, "counting", SCORES[k][1], constrained=None, content=SCORES[k][1])
        write_cell(run, k, "facts", score, nll=0.5 + k, content=score)
        write_jsonl(run / "predictions" / f"{k:02d}" / "digits.jsonl", answers(4 if k == 1 else 3, k == 1))
    results = assemble(run, general=["facts"])
    assert results["matrix"] == SCORES and [task["name"] for task in results["tasks"]] == ["digits", "counting"]
    constrained = results["constrained"]
    assert constrained["known"] == [[0, None], [100, None], [50, None]] and constrained["matrix"][2] == [75, None]
    assert constrained["left_out"] == {"counting": "its samples do not say what the options are"}
    split = results["forgetting"]["tasks"]["digits"]
    assert [split[part]["value"] for part in ("loss", "essential", "superficial")] == [100, 50, 50]
    assert results["forgetting"]["left_out"] == {}  # counting was learned last: nothing of it is forgotten yet
    general = results["general"]
    assert general["mean"] == [90, 60, 30] and general["mean_nll"] == [0.5, 1.5, 2.5]
    assert general["f1"] == [None, pytest.approx(2 * 60 * 90 / 150), pytest.approx(2 * 30 * 60 / 90)]
    assert results["metrics"] == continual_metrics(SCORES, row0=True) | {
        "TA": 60, "KC": 62.5, "essential": 50, "superficial": 50, "recoverable": 100,
        "general": 30, "general_base": 90, "general_nll": 2.5, "general_F1": pytest.approx(40),
    }  # fmt: skip
    write_results(run, results)
    assert metrics_file(run / "results.json") == results["metrics"]


def test_what_was_asked_of_one_stage_alone_splits_nothing(run):
    write_cell(run, 2, "digits", SCORES[2][0], constrained=held(50))
    results = assemble(run)
    assert results["forgetting"]["mean"] is None and results["metrics"]["essential"] is None
    assert "digits" in results["forgetting"]["left_out"]
