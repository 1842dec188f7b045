"""The board of methods: records against the runs they are of, figures against hand-computed ones, what is run again."""

import argparse
import math
from collections import Counter
from pathlib import Path
from typing import Any

import board as script
import numpy as np
import pytest
import search

from mcit.data_prep.errors import InputError
from mcit.data_prep.files import read_json, write_json, write_jsonl
from mcit.eval.forgetting import forgetting_metrics, split_forgetting
from mcit.eval.leaderboard.comparisons import _COMPUTE, Board, _columns, drawn_metrics
from mcit.eval.leaderboard.records import make_record, read_records
from mcit.eval.leaderboard.tables import tables
from mcit.eval.metrics import continual_metrics
from mcit.eval.stats import mean_interval
from mcit.pipeline.methods import EXPANSIONS, METHODS
from mcit.pipeline.run.locks import locked

# --- Records ----------------------------------------------------------------------------------------------------------

# What two stages answer to two tasks and to a task beside them: (score, in the form asked for, score held to the form).
RIGHT, WRONG, NONE, HIDDEN = (100, True, 100), (0, True, 0), (0, False, 0), (0, False, 100)
CELLS = {
    (0, "a"): [WRONG, NONE, NONE, WRONG],
    (0, "b"): [NONE, NONE, WRONG],
    (1, "a"): [RIGHT, RIGHT, RIGHT, WRONG],
    (1, "b"): [WRONG, RIGHT, NONE],
    (2, "a"): [RIGHT, HIDDEN, NONE, HIDDEN],
    (2, "b"): [RIGHT, RIGHT, WRONG],
    (0, "facts"): [RIGHT, RIGHT],
    (2, "facts"): [RIGHT, NONE],
}
CHANCE = {"a": 0.25, "b": None, "facts": None}


def write_cells(run: Path, cells: dict[tuple[int, str], list[Any]] = CELLS, **changes: Any) -> None:
    for (k, task), answers in cells.items():
        rows = []
        for i, (score, form, held) in enumerate(answers):
            asked = CHANCE[task] is not None
            row = {"id": str(i), "image_id": f"{task}-{i}", "score": score, "format_ok": form}
            row |= {"constrained_score": held if asked else None, "verdict": "correct"}
            row |= {"chance": CHANCE[task]} if task != "facts" else {}
            rows.append(row | changes)
        write_jsonl(run / "predictions" / f"{k:02d}" / f"{task}.jsonl", rows)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run of two stages, as far as a record looks at it."""
    write_cells(tmp_path)
    for task in CHANCE:
        keys = ("name", "style", "reasoning", "scorer", "reward", "image_root", "counts", "notes", "hash", "train_hash")
        write_json(tmp_path / "data" / task / "task.json", {**dict.fromkeys(keys, ""), "test_hash": "0f" * 32})
    state = tmp_path / "stages" / "02-b" / "method"
    state.mkdir(parents=True)
    (state / "ewc.safetensors").write_bytes(b"x" * 1000)

    def score(k: int, task: str) -> float:
        return float(np.mean([answer[0] for answer in CELLS[k, task]]))

    matrix = [[score(k, task) for task in ("a", "b")] for k in range(3)]
    split = split_forgetting(tmp_path, {"a": (1, 2)}, {"b": "no form"})
    metrics = continual_metrics(matrix, [1, 2], row0=True) | forgetting_metrics(split)
    cost = {"process_hours": 0.9, "processor_hours": 0.5, "gpu_hours": 0.0, "peak_host_bytes": 2**30}
    results = {
        "schema_version": 1,
        "seed": 3,
        "method": {"ewc": {"weight": 1.0}},
        "stages": [{"k": k, "name": name, "tasks": []} for k, name in enumerate(("base", "a", "b"))],
        "learned": {"a": 1, "b": 2},
        "matrix": matrix,
        "metrics": metrics | {"general": 50.0, "general_base": 100.0},
        "forgetting": split,
        "general": {"tasks": [{"name": "facts"}]},
        "served": [{"engines": ["vllm"]}, {"engines": ["transformers", "vllm"]}, {"engines": []}],
        "cost": [None, cost, cost | {"peak_host_bytes": 2**31}],
        "hashes": {"recipe": "r" * 64, "policies": ["p" * 64] * 3, "data": {}},
        "versions": {"torch": "2"},
        **dict.fromkeys(("name", "tasks", "row0", "stderr", "n", "verdicts", "seconds")),
    }
    write_json(tmp_path / "results.json", results)
    return tmp_path


def record_of(run: Path) -> Any:
    train = {"lineage": "continue", "learning_rate": 1.0}
    return make_record(run, base="tiny", method="ewc", order="stream", keeps="nothing", train=train)


def test_a_record_holds_what_the_board_needs(run):
    record = record_of(run)
    assert record["answers"]["a"] == {"test": "0f" * 6, "chance": 0.25, "learned": "RRRw", "last": "RNnN"}
    assert record["answers"]["b"] == {"test": "0f" * 6, "chance": None, "learned": "rrw", "last": "rrw"}
    assert record["general"]["facts"]["last"] == "rn" and record["general"]["facts"]["learned"] is None
    assert record["engines"] == ["transformers", "vllm"] and record["split"] == ["a"] and record["seed"] == 3
    assert (record["train_seconds"], record["peak_bytes"], record["state_bytes"]) == (3600, 2**31, 1000)


def test_a_record_s_answers_give_the_run_s_own_metrics(run):
    record = record_of(run)
    parts = {**record["answers"], **record["general"]}
    plain = {task: _columns(kept).mean(axis=0, keepdims=True) for task, kept in parts.items()}
    for metric, compute in _COMPUTE.items():
        expected = record["metrics"]["MFN" if metric == "AP" else metric]
        assert float(compute(record, plain)[0]) == pytest.approx(expected), metric
    # By hand, of task a: shown 66.7 then and 25 now, known 66.7 then and 66.7 now.
    assert record["metrics"]["essential"] == pytest.approx(0) and record["metrics"]["superficial"] == pytest.approx(
        125 / 3
    )


@pytest.mark.parametrize("change", [{"score": 50}, {"image_id": "one"}, {"constrained_score": 50.0}])
def test_answers_that_are_no_letter_each_are_not_kept(run, change):
    write_cells(run, {(2, "a"): CELLS[2, "a"]}, **change)
    record = record_of(run)
    assert list(record["answers"]) == ["b"]
    drawn = drawn_metrics([record])
    assert drawn["essential"][:, 0] == pytest.approx(record["metrics"]["essential"])
    assert drawn["AP"][:, 0].std() > 0 and drawn["AP"][0, 0] == record["metrics"]["MFN"]


def test_records_of_another_form_are_refused(tmp_path):
    write_json(tmp_path / "tiny" / "ewc" / "seed-0.json", {"schema_version": 0})
    with pytest.raises(InputError, match=r"seed-0.json: has schema version 0, expected 2\. Delete the file"):
        read_records(tmp_path)


# --- Figures ----------------------------------------------------------------------------------------------------------


def made(method: str, seed: int, ap: float, **changes: Any) -> Any:
    """A record whose answers were not kept: nothing but its seed makes it vary."""
    figures = {"MFT": ap, "BWT": 0.0, "essential": 10.0, "superficial": 10.0, "general": 10.0}
    return {
        "base": "tiny",
        "method": method,
        "order": "stream",
        "seed": seed,
        "keeps": "nothing",
        "train": {"lineage": "stack"},
        "learned": {"a": 1, "b": 2},
        "matrix": [[0.0, 0.0], [ap, 0.0], [ap, ap]],
        "metrics": {**figures, "MFN": ap},
        "split": ["a"],
        "answers": {},
        "general": {},
        "engines": ["vllm"],
        "train_seconds": 10.0,
        "peak_bytes": 2**30,
        "state_bytes": 0,
        "versions": {},
        **changes,
    }


def test_over_seeds_alone_the_interval_is_student_s():
    scores = [50.0, 53.0, 61.0, 48.0, 55.0]
    found = Board([made("x", seed, score) for seed, score in enumerate(scores)]).mean("x", "AP")
    exact = mean_interval(scores)
    assert found["mean"] == pytest.approx(exact["mean"]) and found["n"] == 5
    assert found["high"] - found["low"] == pytest.approx(exact["high"] - exact["low"], rel=0.05)
    alone = Board([made("x", 0, 50.0)]).mean("x", "AP")
    assert alone == {"mean": 50.0, "low": None, "high": None, "n": 1}
    assert Board([made("x", 0, 50.0)]).mean("y", "AP") is None


def test_orders_of_a_seed_are_one_unit_and_bases_weigh_the_same():
    runs = [made("x", 0, 40.0), made("x", 0, 60.0, order="reversed"), made("x", 1, 10.0)]
    found = Board(runs).mean("x", "AP")
    assert found["mean"] == pytest.approx((50 + 10) / 2) and found["n"] == 2
    other = Board([*runs, made("x", 0, 90.0, base="another")]).mean("x", "AP")
    assert other["mean"] == pytest.approx((30 + 90) / 2) and other["n"] == 3


def test_pictures_are_drawn_too_and_alike_for_all():
    """The error over pictures of a mean of 64 answers, half of them right, is that of a binomial share."""

    def kept(letters: str) -> Any:
        answers = {"a": {"test": "ab", "chance": None, "learned": letters, "last": letters}}
        only = {"learned": {"a": 1}, "matrix": [[0.0], [50.0]]}
        return {**only, "answers": answers, "metrics": {"MFN": 50.0, "MFT": 50.0}}

    runs = [made(method, seed, 50.0, **kept("rw" * 32)) for method in ("x", "y") for seed in (0, 1)]
    runs += [made("z", seed, 50.0, **kept("wr" * 32)) for seed in (0, 1)]
    drawn = drawn_metrics(runs)["AP"]
    assert drawn[1:, 0].std() == pytest.approx(100 * math.sqrt(0.25 / 64), rel=0.05)
    assert (drawn[:, 0] == drawn[:, 1]).all() and drawn[1:, 0] + drawn[1:, 4] == pytest.approx(100)
    same, other = Board(runs).differences([("x", "y"), ("x", "z")])
    assert same.interval == {"mean": 0.0, "low": 0.0, "high": 0.0, "n": 2} and same.p == 1.0
    assert other.interval["high"] > 100 * 2 * math.sqrt(0.25 / 64)


def test_differences_are_paired_and_corrected_together():
    """Seeds differ by tens of points, methods on the same seed by two."""
    seeds = (10.0, 90.0, 50.0, 30.0, 70.0)
    runs = [made("base", seed, score) for seed, score in enumerate(seeds)]
    runs += [made("up", seed, score + 2 + 0.1 * (-1) ** seed) for seed, score in enumerate(seeds)]
    runs += [made("noise", seed, score + (seed - 2)) for seed, score in enumerate(seeds)]
    runs += [made("once", 0, 99.0), made("elsewhere", 7, 99.0)]
    pairs = [("up", "base"), ("noise", "base"), ("once", "base"), ("elsewhere", "base")]
    up, noise, once, elsewhere = Board(runs).differences(pairs)
    assert up.interval["mean"] == pytest.approx(2.02) and up.interval["low"] > 1.8 and up.p < 1e-4
    assert noise.interval["mean"] == pytest.approx(0) and noise.p == pytest.approx(1.0)
    assert once.interval["mean"] == pytest.approx(89) and once.p is None and elsewhere is None
    [alone] = Board(runs).differences(pairs[:1])
    assert up.p == pytest.approx(2 * alone.p), "of the two that can be tested"


def test_ranks_are_shared_by_those_that_cannot_be_told_apart():
    seeds = range(5)
    runs = [made("best", seed, 80 + 0.3 * seed) for seed in seeds]
    runs += [made("good", seed, 60 + 3 * (seed % 3)) for seed in seeds]
    runs += [made("like", seed, 62 - 2 * (seed % 2)) for seed in seeds]
    runs += [made("worst", seed, 20 + 0.2 * seed) for seed in seeds]
    assert Board(runs).ranks(["worst", "like", "good", "best"]) == {"best": 1, "good": 2, "like": 2, "worst": 4}


def test_kendall_s_tau():
    found = Board([made(method, 0, score) for method, score in {"a": 10.0, "b": 20.0, "c": 30.0, "d": 25.0}.items()])
    assert found.agreement({"a": 1, "b": 2, "c": 3, "unknown": 4})[0] == pytest.approx(1)
    tau, _, methods = found.agreement({"a": 1, "b": 2, "c": 3, "d": 4})
    assert tau == pytest.approx((5 - 1) / 6) and methods == ["a", "b", "c", "d"]
    assert found.agreement({"a": 1, "b": 2}) is None


# --- What is run, and shown -------------------------------------------------------------------------------------------


def test_every_method_is_on_the_board_or_left_out():
    board = script.read_board()
    used = {name for asked in board["methods"].values() for name in asked.get("with", [])} | {"gere"}
    assert used | set(board["left_out"]) == {*METHODS, *EXPANSIONS} and not used & set(board["left_out"])


def test_which_runs_belong_to_the_board():
    board = {
        "seeds": [0, 1],
        "orders": ["stream", "reversed"],
        "bases": {"one": "recipes/mini/tiny_vlm", "two": "x"},
        "all": [],
    }
    board["methods"] = {"m": {"main": True}, "b": {"main": True, "bound": "AP"}, "once": {}}
    found = script.entries(board, {"m": ["seed=1"]})
    assert {entry.method: entry.keys for entry in found} == {"m": ["seed=1"], "b": [], "once": []}
    names = [str(entry.name) for entry in found]
    assert Counter(entry.method for entry in found) == {"m": 8, "b": 4, "once": 1} and len(set(names)) == 13
    assert names[:5] == ["one/m/stream-seed-0", "two/m/stream-seed-0", "one/b/seed-0", "two/b/seed-0", names[4]]
    assert names[4] == "one/once/stream-seed-0" and names[-1] == "two/m/reversed-seed-1"


def test_what_a_run_of_the_board_is():
    board = script.read_board()
    rate = "train.sft.args.learning_rate=0.001"
    found = {str(entry.name): entry for entry in script.entries(board, {"ewc": ["method.ewc.weight=5", rate]})}
    ewc = found["tiny_vlm/ewc/reversed-seed-3"].recipe()
    assert (ewc.seed, ewc.train.lineage, ewc.sweep, list(ewc.method)) == (3, "continue", None, ["ewc"])
    assert (ewc.method["ewc"]["weight"], ewc.train.sft.args["learning_rate"]) == (5, 0.001)
    assert ewc.eval.cells == "metrics" and found["tiny_vlm/ewc/reversed-seed-3"].recipe().name.startswith("mini-")
    assert [stage.name for stage in ewc.stages] == ["arithmetic", "grounding", "spatial", "counting", "digits"]
    assert len(found["tiny_vlm/multi_task/seed-1"].recipe().stages) == 1
    folders = {name: Path(found[f"{name}/ewc/stream-seed-0"].recipe().base_model.path) for name in board["bases"]}
    assert len(folders) == 2 and all((folder / "model.safetensors").is_file() for folder in folders.values())
    assert found["tiny_vlm/low_rate/stream-seed-0"].recipe().train.sft.args["learning_rate"] == 2.5e-4


@pytest.mark.slow
def test_every_run_of_the_board_can_be_made():
    board = {**script.read_board(), "seeds": [0]}
    for entry in script.entries(board, script.choices(board, script.HERE)):
        assert entry.recipe().seed == 0


# --- How settings are chosen ------------------------------------------------------------------------------------------


def test_every_method_has_as_many_trials_and_its_recipe_s_own_settings_are_the_first():
    board, rate = script.read_board(), "train.sft.args.learning_rate"
    assert {
        len(search.settings(board["search"], asked)) for asked in board["methods"].values() if not asked.get("fixed")
    } == {4}
    assert search.settings(board["search"], board["methods"]["ewc"]) == [
        [f"{rate}=0.0025", "method.ewc.weight=1000"],
        [f"{rate}=0.0025", "method.ewc.weight=100"],
        [f"{rate}=0.001", "method.ewc.weight=1000"],
        [f"{rate}=0.001", "method.ewc.weight=100"],
    ]
    assert search.settings(board["search"], board["methods"]["low_rate"]) == []


@pytest.mark.slow
def test_every_trial_is_of_the_tuning_stream_and_begins_with_the_recipe():
    board = script.read_board()
    for method in board["methods"]:
        for number, (keys, entry) in enumerate(search.trials(board, method)):
            recipe, plain = entry.recipe(), entry._replace(keys=entry.asked.get("set", ())).recipe()
            assert all(":tuning_" in str(task.train) for task in recipe.tasks) and len(recipe.tasks) == 5
            same = (recipe.method, recipe.train.sft.args) == (plain.method, plain.train.sft.args)
            assert same == (number == 0), (method, keys)


def test_the_best_trial_is_chosen_of_equals_the_first(tmp_path):
    board = {"methods": {"m": {}, "bound": {"bound": "MFT"}, "still": {"fixed": True}, "not yet": {}}}
    tried = [("a=1", 50.0, 70.0), ("a=2", 60.0, 60.0), ("a=3", 60.0, 65.0)]
    trials = [{"keys": [f"x.{key}"], "AP": ap, "MFT": mft, "BWT": None} for key, ap, mft in tried]
    for method, figure in (("m", "AP"), ("bound", "MFT")):
        write_json(search.search_record(tmp_path, method), {"figure": figure, "trials": trials})
    assert search.choices(board, tmp_path) == {"m": ["x.a=2"], "bound": ["x.a=1"], "still": []}
    rows = [row for row in search.rows(board, tmp_path) if row[0] == "m"]
    assert rows[1] == ["m", "a 2", "60.0", "60.0", "–", "chosen"] and rows[2][-1] == ""


def test_a_method_that_was_not_searched_is_not_run(tmp_path):
    entry = next(one for one in script.entries(script.read_board(), {}) if one.method == "ewc")
    with pytest.raises(InputError, match=r"search/ewc\.json: is missing\. Choose settings: board\.py search ewc"):
        script._run(entry, [], argparse.Namespace(records=tmp_path))


def test_trials_are_recorded_when_all_are_done(tmp_path, monkeypatch):
    board, done = script.read_board(), list[str]()

    def perform(recipe: Any, folder: Path, *_: Any) -> None:
        if len(done) == 3:
            raise InputError("the disk is full", where="here")
        done.append(f"{recipe.train.sft.args['learning_rate']}")
        metrics = {"AP": 10.0 * len(done), "MFT": 50.001}
        monkeypatch.setattr(search, "read_results", lambda _: {"metrics": metrics})

    monkeypatch.setattr(search, "perform", perform)
    options = argparse.Namespace(methods=["sequential"], most=None, records=tmp_path, runs=tmp_path / "runs")
    options.launch = "single"
    monkeypatch.setattr(script, "read_board", lambda: board)
    assert script.search(options) == 1 and not search.search_record(tmp_path, "sequential").exists()
    done.clear()
    monkeypatch.setattr(search, "perform", lambda *given: perform(*given) if len(done) < 3 else done.append("4"))
    assert script.search(options) == 0
    found = read_json(search.search_record(tmp_path, "sequential"))
    assert found["figure"] == "AP" and [trial["AP"] for trial in found["trials"]] == [10.0, 20.0, 30.0, 30.0]
    assert found["trials"][0] == {
        "keys": ["train.sft.args.learning_rate=0.0025"],
        "AP": 10.0,
        "MFT": 50.0,
        "BWT": None,
    }


# --- What is done, and shown ------------------------------------------------------------------------------------------


@pytest.fixture
def options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> argparse.Namespace:
    """A small board, whose runs are done as soon as they are begun; `begun` names them."""
    board = {
        "seeds": [0, 1],
        "orders": ["stream"],
        "bases": {"tiny": "b"},
        "left_out": {},
        "all": [],
        "search": {"seed": 0},
    }
    board["methods"] = {"sequential": {"main": True}, "ewc": {"main": True}, "once": {}}
    given = {"records": tmp_path / "records", "runs": tmp_path / "runs", "launch": "single"}
    options = argparse.Namespace(methods=[], most=None, begun=[], **given)

    def run(entry: Any, chosen: Any, options: argparse.Namespace) -> None:
        options.begun.append(str(entry.name))
        if entry.seed == 0 and entry.method == "once":
            raise InputError("training changed no weight", where="stage 1")
        record = made(entry.method, entry.seed, 50.0 + entry.seed, base=entry.base, schema_version=2)
        write_json(script._record(options.records, entry), record)

    monkeypatch.setattr(script, "_run", run)
    monkeypatch.setattr(script, "read_board", lambda: board)
    return options


def test_what_has_a_record_is_not_run_again(options, capsys):
    options.most = 1
    assert script.run(options) == 0 and options.begun == ["tiny/sequential/stream-seed-0"]
    options.most = None
    assert script.run(options) == 1, "one of them failed, and the others were done all the same"
    rest = ["ewc/stream-seed-0", "once/stream-seed-0", "sequential/stream-seed-1", "ewc/stream-seed-1"]
    assert options.begun[1:] == [f"tiny/{name}" for name in rest]
    assert "once/stream-seed-0: stage 1: training changed no weight" in capsys.readouterr().out
    options.methods = ["sequential", "ewc"]
    assert script.run(options) == 0 and len(options.begun) == 5
    assert "4 of 4 are done" in capsys.readouterr().out
    options.methods = ["ewcc"]
    with pytest.raises(InputError, match=r"has no method ewcc\. It has sequential, ewc, once"):
        script.run(options)


def test_what_another_process_runs_is_left_to_it(options, capsys):
    options.methods = ["sequential"]
    with locked(options.runs / "tiny" / "sequential" / "stream-seed-0" / "board.lock", "the run"):
        assert script.run(options) == 0
    assert options.begun == ["tiny/sequential/stream-seed-1"]
    assert "stream-seed-0 is being done by process" in capsys.readouterr().out


def test_the_page_of_a_board_that_is_not_complete(options):
    assert "There\nare 0 of 5 runs so far" in script.rendered(options.records)
    script.run(options)
    page = script.rendered(options.records)
    assert "are 4 of 5 runs so far" in page
    assert "| 1 | ewc | stack | 2/2 | 50.5 ± " in page and "| 1 | sequential | stack | 2/2 | 50.5 ± " in page
    assert "| ewc | sequential | +0.0 [+0.0, +0.0] |" in page and "No study shares three methods" in page


def test_tables_of_methods_that_keep_different_things():
    runs = [made("sequential", seed, 50.0 + seed) for seed in (0, 1)]
    runs += [made("replay", seed, 70.0, keeps="past data", train_seconds=15.0, state_bytes=2048) for seed in (0, 1)]
    runs += [made("one", 0, 60.0, train={"lineage": "continue"}), made("multi_task", 0, 90.0)]
    planned = {"sequential": 2, "replay": 2, "one": 1, "multi_task": 2, "absent": 4}
    study = {"name": "s", "source": "here", "scores": {"one": 3.0, "replay": 2.0, "sequential": 1.0}}
    found = tables(Board(runs), planned, {"multi_task": "AP"}, [study])
    assert {kept: [row["method"] for row in rows] for kept, rows in found["groups"].items()} == {
        "nothing": ["sequential", "one"],
        "past data": ["replay"],
    }
    [replay] = found["groups"]["past data"]
    assert (replay["time"], replay["memory"], replay["state"], replay["n"]) == ("1.50 ×", "+0", "2", "2/2")
    assert [row["rank"] for row in found["groups"]["nothing"]] == ["1", "–"] and found["planned"] == 11
    assert found["bounds"] == [("multi_task", "1/2", "AP", "90.0")]
    assert [(row["method"], row["other"], row["n"]) for row in found["versus"]] == [("replay", "sequential", 2)]
    [agreement] = found["agreements"]
    assert agreement["methods"] == "one > replay > sequential" and agreement["tau"] == "+0.33"


def test_the_page_in_the_docs_is_that_of_the_records():
    assert script.PAGE.read_text() == script.rendered(script.HERE)
    for path in script.HERE.glob("*/*/*.json"):
        record = read_json(path)
        assert path == script.HERE / record["base"] / record["method"] / path.name and path.stat().st_size < 10_000
