"""Stages that are evaluated while the next ones train: the same results, and nothing left behind when it goes wrong."""

import os
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from test_run import quiet, write_two

import mcit.pipeline.run.beside as beside
from mcit.data_prep.errors import InputError
from mcit.data_prep.files import read_json
from mcit.pipeline.recipe.loading import load_recipe
from mcit.pipeline.run.beside import perform_run
from mcit.pipeline.run.runner import perform_steps, start_run
from mcit.pipeline.run.step import Launch
from mcit.pipeline.run.steps import Run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = write_two(tmp_path_factory.mktemp("beside"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield folder


def open_run(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch, *overrides: str) -> Run:
    """A run that finds no answers of another one in its cache."""
    monkeypatch.setenv("MCIT_CACHE", str(folder / f"cache-{name}"))
    return start_run(load_recipe(folder / "two.yaml", overrides), folder / name, Launch.named("single"), quiet())


def followers() -> list[psutil.Process]:
    return [one for one in psutil.Process().children(recursive=True) if "--follow" in one.cmdline()]


def test_a_run_evaluated_beside_training_is_the_same(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal, run = quiet(), open_run(folder, "beside", monkeypatch)
    perform_run(run, terminal, "cpu")
    assert "has stopped" not in terminal.console.export_text() and followers() == []
    steps = run.dir / "steps"
    assert [read_json(steps / f"evaluate-{k}.json")["answered"] for k in (0, 1, 2)] == [2, 2, 2]
    assert read_json(steps / "evaluate.json")["answered"] == 0  # nothing was left to do

    after = open_run(folder, "after", monkeypatch)
    perform_steps(after, after.steps(), quiet())
    assert read_json(after.dir / "steps" / "evaluate.json")["answered"] == 6
    one, other = (read_json(folder / name / "results.json") for name in ("beside", "after"))
    for key in one.keys() - {"seconds", "cost"}:
        assert one[key] == other[key], key


def test_without_its_evaluation_beside_a_run_is_finished_all_the_same(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "typer.py").write_text("raise RuntimeError('no such luck')\n")
    broken = os.environ | {"PYTHONPATH": str(tmp_path)}
    monkeypatch.setattr(beside, "_environment", lambda *_: broken)
    terminal, run = quiet(), open_run(folder, "alone", monkeypatch)
    perform_run(run, terminal, "cpu")
    assert "evaluation beside training has stopped: RuntimeError: no such luck" in terminal.console.export_text()
    assert read_json(run.dir / "steps" / "evaluate.json")["answered"] == 6


def test_training_that_fails_takes_its_follower_along(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = open_run(folder, "failing", monkeypatch, "train.sft.args.learning_rate=1e38", "train.sft.args.max_steps=4")
    seen: list[int] = []
    train = run.train

    def watched(stage: object) -> object:
        seen.append(len(followers()))
        return train(stage)  # type: ignore[arg-type]

    monkeypatch.setattr(run, "train", watched)
    with pytest.raises(InputError, match="not finite"):
        perform_run(run, quiet(), "cpu")
    assert max(seen) == 1 and followers() == []


@pytest.mark.parametrize(
    ("visible", "asked", "seen"),
    [(None, "3", "3"), ("4,5,6,7,9", "3", "7"), ("4,5,6,7,9", "4,3", "9,7"), ("", "cpu", ""), ("-1", "cpu", "-1")],
)
def test_the_gpus_that_evaluation_sees(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, asked: str, seen: str
) -> None:
    monkeypatch.setattr(beside, "gpus", lambda: ["one"] * 5)
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert beside._environment(asked, Launch.named("ddp", 3))["CUDA_VISIBLE_DEVICES"] == seen


@pytest.mark.parametrize(
    ("gpus", "processes", "asked", "remedy"),
    [
        (5, 3, "2", "Free are 3, 4"),
        (5, 3, "5", "Free are 3, 4"),
        (5, 3, "3,", "Free are 3, 4"),
        (5, 3, "3,3", "Free are 3, 4"),
        (5, 3, "cpu", "Free are 3, 4"),
        (2, 2, "1", r"Train on fewer \(--gpus\)"),
        (0, 1, "0", "Without a GPU: cpu"),
    ],
)
def test_what_training_needs_evaluation_does_not_get(
    monkeypatch: pytest.MonkeyPatch, gpus: int, processes: int, asked: str, remedy: str
) -> None:
    monkeypatch.setattr(beside, "gpus", lambda: ["one"] * gpus)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    launch = Launch.named("ddp", processes)
    with pytest.raises(InputError, match=f"--evaluate-on {asked}: not a GPU that training leaves free. {remedy}"):
        beside._environment(asked, launch)
