"""A stage that is killed for real, in the middle of whatever it does, and goes on to the same result."""

import multiprocessing
import os
import shutil
import signal
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from training import TINY, launch, make_run, uneven

from mcit.data_prep.files import read_json, read_jsonl, write_json, write_jsonl
from mcit.eval.hashing import hash_model
from mcit.eval.serving import read_serving, write_serving
from mcit.pipeline.stage.resume import Interval

RECIPE = """
train:
  lora: {r: 4, alpha: 8, dropout: 0.1}
  global_batch_size: 4
  sft: {args: {learning_rate: 1e-3, logging_steps: 3, num_train_epochs: 2, gradient_checkpointing: false}}
  rft: {args: {learning_rate: 1e-3, logging_steps: 3, num_train_epochs: 2, gradient_checkpointing: false, beta: 0.1,
               num_generations: 4, max_completion_length: 6, max_steps: 10}}
"""
STEPS = 10  # 20 samples in batches of 4, twice


def attempt(run: Path, recipe: Path, overrides: list[str], steps: Connection, slow_disk: bool) -> None:
    """Train the stage, in a process of its own, and tell the parent each step before going on from it."""
    from transformers import TrainerCallback

    import mcit.pipeline.stage.checkpoints as checkpoints
    from mcit.pipeline.recipe.loading import load_recipe
    from mcit.pipeline.sft import make_trainer
    from mcit.pipeline.stage.stage import run_stage

    class Tell(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
            steps.send(state.global_step)
            steps.recv()

    def make(entered: Any) -> Any:
        trainer = make_trainer(entered)
        trainer.add_callback(Tell)
        return trainer

    if slow_disk:
        sync = checkpoints._sync

        def told(path: Path) -> None:
            steps.send(path.name)
            steps.recv()
            sync(path)

        checkpoints._sync = told
    run_stage(load_recipe(recipe, overrides), 1, run, "sft", make)


@pytest.fixture(scope="module")
def context() -> Iterator[Any]:
    """Processes are forked from one that has imported everything, which takes most of the time."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mcit.pipeline.sft", "deepspeed", "training"])
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}.items():
            patch.setenv(name, value)
        yield context


def samples() -> dict[str, list[Any]]:
    return {"colour": uneven("colour", 20, 1)}


@pytest.fixture
def killed(tmp_path: Path) -> tuple[Path, Path]:
    """A run to be killed, and its recipe."""
    return tmp_path, make_run(tmp_path, samples(), RECIPE)


def train(
    context: Any,
    run: tuple[Path, Path],
    *overrides: str,
    sign: signal.Signals | None = None,
    at: int | str = 0,
    slow_disk: bool = False,
) -> list[int | str]:
    """One attempt, which gets the signal `sign` when it comes to `at`; what it came to."""
    here, there = context.Pipe()
    process = context.Process(target=attempt, args=(*run, list(overrides), there, slow_disk))
    process.start()
    there.close()
    seen = []
    try:
        while True:
            seen.append(here.recv())
            if sign is not None and seen[-1] == at:
                os.kill(process.pid, sign)
            here.send("go on")
    except (EOFError, BrokenPipeError, ConnectionResetError):
        process.join(60)
    finally:
        process.kill()
    if sign is None:
        assert process.exitcode == 0
    else:
        assert process.exitcode == (-sign if sign == signal.SIGKILL else 1)  # `Preempted` out of the process
    return seen


def outcome(run: Path) -> dict[str, Any]:
    """What a stage leaves, without how long it took."""
    stage = run / "stages" / "01-colour"
    timed = ("step_time", "train_runtime", "train_samples_per_second", "train_steps_per_second")
    log = [{k: v for k, v in row.items() if k not in timed} for row in read_jsonl(stage / "train_log.jsonl")]
    tensors = load_file(stage / "adapter" / "adapter_model.safetensors")
    return {"log": log, **{name: tensor.tolist() for name, tensor in tensors.items()}}


def left(run: Path) -> list[str]:
    """The checkpoints of the stage, and what else is beside them."""
    return sorted(path.name for path in (run / "stages" / ".01-colour.partial" / "checkpoints").glob("*"))


@pytest.fixture(scope="module")
def uninterrupted(context: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What comes of a stage that nothing happens to."""
    run = tmp_path_factory.mktemp("whole")
    assert train(context, (run, make_run(run, samples(), RECIPE))) == list(range(1, STEPS + 1))
    return outcome(run)


def test_kills_at_any_step_change_nothing(
    context: Any, killed: tuple[Path, Path], uninterrupted: dict[str, Any]
) -> None:
    """Asked to stop, it loses no step; killed, those since the last checkpoint. Then there is nothing left to do."""
    every = "train.checkpoint_every=3"
    assert train(context, killed, every, sign=signal.SIGTERM, at=2) == [1, 2]
    assert left(killed[0]) == ["00000002"]
    assert train(context, killed, every, sign=signal.SIGKILL, at=7) == [3, 4, 5, 6, 7]
    assert left(killed[0]) == ["00000002", "00000005"]
    assert train(context, killed, every, sign=signal.SIGUSR1, at=8) == [6, 7, 8]
    assert train(context, killed, every, sign=signal.SIGKILL, at=9) == [9]
    assert left(killed[0]) == ["00000005", "00000008"]
    assert train(context, killed, every) == [9, 10]
    assert outcome(killed[0]) == uninterrupted
    assert {path.name for path in (killed[0] / "stages").iterdir()} == {"00-base", "01-colour"}
    assert train(context, killed) == []


def test_a_stage_goes_on_in_smaller_micro_batches(context: Any, tmp_path: Path) -> None:
    """What is advised where memory ran out: what is done stays done, and the global batch is what it was."""
    whole, parts = ((tmp_path / name, make_run(tmp_path / name, samples(), RECIPE)) for name in ("whole", "parts"))
    alike = ("train.lora.dropout=0", "train.checkpoint_every=2")  # each micro-batch draws its own dropout
    train(context, whole, *alike)
    train(context, parts, *alike, sign=signal.SIGKILL, at=5)
    smaller = ("train.sft.args.per_device_train_batch_size=2", "train.sft.args.gradient_checkpointing=true")
    assert train(context, parts, *alike, *smaller) == [5, 6, 7, 8, 9, 10]
    one, other = outcome(whole[0]), outcome(parts[0])
    for name in one.keys() - {"log"}:
        assert torch.allclose(torch.tensor(one[name]), torch.tensor(other[name]), atol=1e-5), name
    assert train(context, parts, *alike) == []


def test_killed_while_it_writes_and_with_a_torn_checkpoint(
    context: Any, killed: tuple[Path, Path], uninterrupted: dict[str, Any]
) -> None:
    every = "train.checkpoint_every=2"
    train(context, killed, every, sign=signal.SIGKILL, at="weights.safetensors", slow_disk=True)
    assert left(killed[0]) == [".00000002.writing"]
    assert train(context, killed, every, sign=signal.SIGKILL, at=5) == [1, 2, 3, 4, 5]
    assert left(killed[0]) == ["00000002", "00000004"]
    last = killed[0] / "stages" / ".01-colour.partial" / "checkpoints" / "00000004"
    os.truncate(last / "optimizer.pt", (last / "optimizer.pt").stat().st_size // 2)
    assert train(context, killed, every)[0] == 3
    assert outcome(killed[0]) == uninterrupted
    notes = read_json(killed[0] / "stages" / "01-colour" / "trained.json")["notes"]
    assert notes[0].startswith(f"{last}: the checkpoint is not used: optimizer.pt has")
    assert notes[1:] == ["went on after step 2"]


def test_a_checkpoint_of_another_stage_is_never_used(context: Any, killed: tuple[Path, Path]) -> None:
    """Nor does how often they are written make it another stage."""
    train(context, killed, "train.checkpoint_every=2", sign=signal.SIGKILL, at=5)
    assert train(context, killed, "train.checkpoint_every=4", sign=signal.SIGTERM, at=5) == [5]
    other = ("train.checkpoint_every=never", "train.sft.args.learning_rate=2e-3")
    assert train(context, killed, *other, sign=signal.SIGKILL, at=7)[0] == 1
    assert left(killed[0]) == []


def test_a_method_goes_on_from_its_own_state(context: Any, tmp_path: Path) -> None:
    runs = [(tmp_path / name, make_run(tmp_path / name, samples(), RECIPE)) for name in ("whole", "killed")]
    growing = ("method={'training:Growing': {}}", "train.sft.args.max_steps=4", "train.checkpoint_every=1")
    train(context, runs[1], *growing, sign=signal.SIGKILL, at=3)
    for run in runs:
        train(context, run, *growing)
    assert outcome(runs[0][0]) == outcome(runs[1][0])


def evaluate(run: Path, kill_after: int) -> None:
    """Evaluate the base on its task, one answer at a time; killed when it has so many."""
    from mcit.eval.config import EvalConfig
    from mcit.eval.engines.transformers import TransformersEngine
    from mcit.eval.evaluate import evaluate_cells

    stream = TransformersEngine.stream

    def watched(*args: Any) -> Iterator[Any]:
        for count, answer in enumerate(stream(*args)):
            if count == kill_after:
                os.kill(os.getpid(), signal.SIGKILL)
            yield answer

    TransformersEngine.stream = watched  # type: ignore[method-assign]
    config = EvalConfig(engine="transformers", batch_size=1, max_new_tokens=4)
    evaluate_cells(run, [(0, "colour")], config, cache=run / "cache")


def test_an_evaluation_that_is_killed_goes_on_at_the_next_answer(context: Any, tmp_path: Path) -> None:
    answers = []
    for name, kills in (("whole", ()), ("killed", (2, 3))):
        make_run(tmp_path / name, samples(), RECIPE)
        write_jsonl(tmp_path / name / "data" / "colour" / "test.jsonl", samples()["colour"][:8])
        base, digest = tmp_path / name / "stages" / "00-base", hash_model(str(TINY))
        write_serving(base, read_serving(base).model_copy(update={"base_hash": digest, "hash": digest}))
        predictions = tmp_path / name / "predictions" / "00"
        for number, kill_after in enumerate((*kills, 99)):
            process = context.Process(target=evaluate, args=(tmp_path / name, kill_after))
            process.start()
            process.join()
            assert process.exitcode == (0 if kill_after == 99 else -signal.SIGKILL)
            if kill_after < 99:  # the header, and the answers of all attempts so far
                assert len((predictions / "colour.partial.jsonl").read_text().splitlines()) == 1 + sum(
                    kills[: number + 1]
                )
        answers.append(read_jsonl(predictions / "colour.jsonl"))
    assert answers[0] == answers[1] and len(answers[0]) == 8


@pytest.mark.parametrize(
    ("mode", "paradigm"),
    [
        pytest.param(mode, paradigm, marks=[] if (mode, paradigm) == ("zero2", "sft") else pytest.mark.slow)
        for mode in ("ddp", "zero2", "zero3")
        for paradigm in ("sft", "rft")
    ],
)
def test_processes_stop_together_and_go_on(
    tmp_path: Path, mode: str, paradigm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of two is asked to: in the middle of an epoch, the second, whose order differs from the first's."""
    monkeypatch.setenv("PYTHONPATH", f"{Path(__file__).parent}:{os.environ.get('PYTHONPATH', '')}")
    outcomes = []
    for name in ("stopped", "whole"):
        run = tmp_path / name
        recipe, marker = make_run(run, samples(), RECIPE), tmp_path / "marker"
        overrides = [f"method={{'training:Stop': {{step: 7, unless: {marker}}}}}", f"train.paradigm={paradigm}"]
        overrides += ["train.rft.rewards={'rewarding:spread': 1, accuracy: 0, format: 0}"]
        if name == "stopped":
            said = launch(run, recipe, mode, 2, *overrides, stage=1, script=paradigm, fails=True)
            assert said.count("stopped after step 7; the same command goes on from here") == 2
            assert left(run) == ["00000007"]
        launch(run, recipe, mode, 2, *overrides, stage=1, script=paradigm)
        trained = read_json(run / "stages" / "01-colour" / "trained.json")
        assert (trained["mode"], trained["processes"]) == (mode, 2)
        assert trained["notes"] == (["went on after step 7"] if name == "stopped" else [])
        outcomes.append(outcome(run))
    one, other = outcomes
    assert one.keys() == other.keys()
    for stopped, whole in zip(one.pop("log"), other.pop("log"), strict=True):
        assert stopped == pytest.approx(whole, rel=1e-5)
    assert all(np.allclose(tensor, other[name], rtol=0, atol=1e-6) for name, tensor in one.items())


@pytest.mark.slow
def test_one_process_goes_on_where_two_stopped(
    context: Any, killed: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under data parallel; a checkpoint of ZeRO is not used."""
    monkeypatch.setenv("PYTHONPATH", f"{Path(__file__).parent}:{os.environ.get('PYTHONPATH', '')}")
    run, recipe = killed
    plain = [f"method={{'training:Stop': {{step: 7, unless: {run / 'marker'}}}}}", "train.lora.dropout=0.0"]
    launch(run, recipe, "ddp", 2, *plain, stage=1, fails=True)
    assert left(run) == ["00000007"]
    copy = run.with_name("zero")
    shutil.copytree(run, copy, symlinks=True)
    manifest = copy / "stages" / ".01-colour.partial" / "checkpoints" / "00000007" / "manifest.json"
    write_json(manifest, read_json(manifest) | {"mode": "zero2"})
    assert train(context, killed, *plain)[0] == 8
    assert train(context, (copy, recipe), *plain)[0] == 1
    note = read_json(copy / "stages" / "01-colour" / "trained.json")["notes"][0]
    assert "2 processes under zero2 wrote it, and this is 1 under single" in note
    one, other = outcome(run), outcome(copy)
    assert all(np.allclose(one[name], other[name], rtol=0, atol=1e-5) for name in one if name != "log")


def test_intervals() -> None:
    assert [Interval.of(value) for value in (7, "90s", "10m", "2h", "never")] == [
        Interval(steps=7),
        Interval(seconds=90),
        Interval(seconds=600),
        Interval(seconds=7200),
        Interval(),
    ]
    assert Interval(steps=7).is_due(7, 0) and not Interval(steps=7).is_due(6, 1e9)
    assert Interval(seconds=90).is_due(0, 90) and not Interval(seconds=90).is_due(10**9, 89.9)
    assert not Interval().is_due(10**9, 1e9)
