"""What a stage tells while it trains and afterwards: trackers, `live.json`, cost, `mcit status`."""

import os
from pathlib import Path
from typing import Any

import pytest
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.record_writer import masked_crc32c
from training import make_run, uneven
from transformers import TrainerCallback

from mcit.data_prep.errors import InputError
from mcit.data_prep.files import read_json, read_jsonl
from mcit.pipeline.recipe.loading import load_recipe
from mcit.pipeline.run.terminal import _cost, _duration, _progress
from mcit.pipeline.sft import make_trainer
from mcit.pipeline.stage.stage import run_stage
from mcit.pipeline.stage.trackers import set_environment
from mcit.pipeline.stage.workplace import read_progress, work_folder
from mcit.pipeline.training.arguments import check_stage

RECIPE = """
train:
  lora: {r: 4, alpha: 8}
  global_batch_size: 4
  sft: {args: {max_steps: 5, logging_steps: 2, report_to: tensorboard}}
"""
VARIABLES = ("TENSORBOARD_LOGGING_DIR", "TRACKIO_DIR", "WANDB_MODE", "WANDB_DIR", "WANDB_PROJECT", "WANDB_RUN_ID")


@pytest.fixture
def untold(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """No tracker has been told anything, and what it is told is forgotten."""
    for name in (*VARIABLES, "WANDB_RESUME"):
        monkeypatch.setenv(name, "")  # so that it is restored
        monkeypatch.delenv(name)
    return monkeypatch


def scalars(file: Path) -> dict[str, list[tuple[int, float]]]:
    """The curves in an event file: records of length, checksum, event, checksum."""
    found: dict[str, list[tuple[int, float]]] = {}
    content = file.read_bytes()
    while content:
        size = int.from_bytes(content[:8], "little")
        record, checksum = content[12 : 12 + size], content[12 + size : 16 + size]
        assert int.from_bytes(checksum, "little") == masked_crc32c(record)
        event = Event.FromString(record)
        for value in event.summary.value:
            if value.HasField("simple_value"):
                found.setdefault(value.tag, []).append((event.step, value.simple_value))
        content = content[16 + size :]
    return found


def test_a_stage_is_seen_while_it_trains_and_counted_afterwards(tmp_path: Path, untold: pytest.MonkeyPatch) -> None:
    recipe = make_run(tmp_path, {"colour": uneven("colour", 8, 1)}, RECIPE)
    folder, seen = tmp_path / "stages" / "01-colour", list[Any]()
    untold.setattr("mcit.pipeline.stage.live._EVERY", 0.0)

    class Look(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            seen.append(read_progress(work_folder(folder)))

    def make(entered: Any) -> Any:
        trainer = make_trainer(entered)
        trainer.add_callback(Look)
        return trainer

    run_stage(load_recipe(recipe), 1, tmp_path, "sft", make)
    assert [(progress["step"], progress["steps"]) for progress in seen] == [(0, 5), (1, 5), (2, 5), (2, 5), (4, 5)]
    assert seen[0]["left"] is None and seen[-1]["left"] > 0 and seen[-1]["seconds"] > 0

    log = read_jsonl(folder / "train_log.jsonl")
    assert seen[-1]["loss"] == log[2]["loss"]
    [events] = (tmp_path / "logs" / "tensorboard" / "01-colour").iterdir()
    curves = scalars(events)
    losses = [(row["step"], row["loss"]) for row in log if "loss" in row]
    assert [step for step, _ in curves["train/loss"]] == [step for step, _ in losses] == [1, 2, 4]
    assert [loss for _, loss in curves["train/loss"]] == pytest.approx([loss for _, loss in losses])

    trained = read_json(folder / "trained.json")
    cost = trained["cost"]
    assert (cost["steps"], cost["samples"], cost["gpu_hours"], cost["peak_gpu_bytes"]) == (5, 20, 0.0, None)
    assert cost["tokens"] == log[-1]["num_tokens"] > 20 * 4
    assert cost["process_hours"] == pytest.approx(trained["seconds"] / 3600, abs=1e-6) and cost["peak_host_bytes"] > 1e8
    assert 0 < seen[0]["processor_seconds"] < seen[-1]["processor_seconds"] < 3600 * cost["processor_hours"]


def test_a_users_own_settings_win(untold: pytest.MonkeyPatch, tmp_path: Path) -> None:
    untold.setenv("WANDB_MODE", "online")
    set_environment("stream", "02-a+b", tmp_path, "0123456789abcdef")
    told = {name: os.environ[name] for name in VARIABLES}
    assert told == {
        "TENSORBOARD_LOGGING_DIR": str(tmp_path / "logs" / "tensorboard" / "02-a+b"),
        "TRACKIO_DIR": str(tmp_path / "logs" / "trackio"),
        "WANDB_MODE": "online",
        "WANDB_DIR": str(tmp_path / "logs"),
        "WANDB_PROJECT": "stream",
        "WANDB_RUN_ID": "02-a-b-0123456789ab",
    }


@pytest.mark.parametrize(
    ("trackers", "line"),
    [
        ("clearml", "recipe: train.sft.args.report_to: clearml is not installed. pip install clearml"),
        ("[tensorboard, wandbb]", "recipe: train.sft.args.report_to: wandbb is no tracker. Did you mean `wandb`?"),
    ],
)
def test_a_tracker_that_is_not_there_is_refused_before_training(tmp_path: Path, trackers: str, line: str) -> None:
    recipe = make_run(tmp_path, {"colour": uneven("colour", 8, 1)}, RECIPE)
    with pytest.raises(InputError) as refusal:
        check_stage(load_recipe(recipe, [f"train.sft.args.report_to={trackers}"]).stages[0])
    assert str(refusal.value) == line


def test_the_lines_of_mcit_status() -> None:
    progress = {"step": 120, "steps": 500, "loss": 1.23456, "seconds": 9.0, "left": 754.0}
    assert _progress(progress, True) == "  step 120 of 500, loss 1.235, 13 min left"
    assert _progress(progress | {"loss": None}, False) == "  stopped at step 120 of 500"
    cost = {"process_hours": 12.5, "gpu_hours": 0.0, "tokens": 1234567, "peak_host_bytes": 3e9, "peak_gpu_bytes": None}
    assert _cost(cost) == "  12.5 process hours, 1,234,567 tokens, at most 3 GB RAM"
    assert _cost(cost | {"gpu_hours": 12.5, "peak_gpu_bytes": 1.1e10}).endswith("at most 11 GB GPU, 3 GB RAM")
    assert [_duration(seconds) for seconds in (5, 119, 120, 7199, 7200, 2e6)] == [
        *("5 s", "119 s", "2 min", "120 min", "2 h", "23 d"),
    ]
