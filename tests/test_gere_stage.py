"""GeRe in real stages: steps and weights alike in any split; its anchor made, found and gone; one method and more."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from families import save_qwen3_vl_moe
from safetensors.torch import load_file
from torch import Tensor
from training import largest_gap, launch, make_run, make_samples, uneven

from mcit.data_prep.errors import InputError
from mcit.data_prep.files import read_jsonl
from mcit.pipeline.recipe.loading import load_recipe
from mcit.pipeline.rft import make_trainer as make_rft_trainer
from mcit.pipeline.sft import make_trainer
from mcit.pipeline.stage.stage import run_stage
from mcit.pipeline.training.replay import backbone

RECIPE = """
method: {gere: {per_batch: 3, weight: 1}}
train:
  lora: {r: 4, alpha: 8, dropout: 0}
  global_batch_size: 8
  sft: {args: {learning_rate: 0.1, lr_scheduler_type: constant, optim: sgd, logging_steps: 1, num_train_epochs: 2,
               gradient_checkpointing: false}}
"""
SMALL = "train.sft.args.per_device_train_batch_size=2"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    """Two tasks with images, and general samples with images and without."""
    run = tmp_path_factory.mktemp("prepared")
    anchors = {"pictures": make_samples("pictures", 4), "sentences": uneven("sentences", 5, 0)}
    tasks = {"colour": uneven("colour", 12, 1), "again": uneven("again", 12, 1)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MCIT_CACHE", str(run / "cache"))
        yield run, make_run(run, tasks, RECIPE, anchors=anchors)


@pytest.fixture(scope="module")
def first(prepared: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose first stage is trained."""
    run = tmp_path_factory.mktemp("first") / "run"
    train(copy_run(prepared[0], run, "00-base"), prepared[1], 1)
    return run


def copy_run(run: Path, to: Path, *stages: str) -> Path:
    (to / "stages").mkdir(parents=True)
    (to / "data").symlink_to(run / "data")
    for name in stages:
        (to / "stages" / name).symlink_to(run / "stages" / name)
    return to


def train(
    run: Path, recipe: Path, k: int, *overrides: str, watch: Callable[[Any], None] = lambda trainer: None
) -> Path:
    def make(entered: Any) -> Any:
        trainer = make_trainer(entered)
        watch(trainer)
        return trainer

    run_stage(load_recipe(recipe, overrides), k, run, "sft", make)
    return run / "stages" / ("01-colour", "02-again")[k - 1]


def anchor_files() -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (Path(os.environ["MCIT_CACHE"]) / "anchors").iterdir()}


def logged(stage: Path, key: str) -> list[float]:
    return [row[key] for row in read_jsonl(stage / "train_log.jsonl")[:-1]]


def adapter(stage: Path) -> dict[str, Tensor]:
    return load_file(stage / "adapter" / "adapter_model.safetensors")


def test_a_stage_takes_the_steps_of_sequential_tuning_and_the_split_does_not_matter(
    prepared: tuple[Path, Path], first: Path, tmp_path: Path
) -> None:
    """8 + 3 a batch, in as few passes as the two kinds allow, or two samples at a time: the same losses and weights."""
    stage, passes = first / "stages" / "01-colour", []

    def watch(trainer: Any) -> None:
        backbone(trainer.model).register_forward_hook(lambda *_: passes.append(trainer.model.training))

    split = train(copy_run(prepared[0], tmp_path, "00-base"), prepared[1], 1, SMALL, watch=watch)
    assert len(logged(stage, "loss")) == len(logged(split, "loss")) == 4  # twice 12 samples in batches of 8
    assert sum(passes) == 4 * 6  # 11 samples, 2 at a time: 8 to 11 of them with images
    for key in ("loss", "gere_loss", "grad_norm", "num_tokens"):
        assert logged(stage, key) == pytest.approx(logged(split, key), rel=1e-4, abs=1e-6), key
    assert largest_gap(adapter(stage), adapter(split)) < 1e-5


def test_replayed_samples_ride_in_the_pass_of_the_batch(
    prepared: tuple[Path, Path], first: Path, tmp_path: Path
) -> None:
    """One pass a step where all have images, and two otherwise; what is not active replays nothing."""
    for settings, expected in (("{per_batch: 3}", 2), ("{per_batch: 3, weight: 0, label_weight: 0}", 1)):
        run, passes = copy_run(prepared[0], tmp_path / str(expected), "00-base"), []

        def watch(trainer: Any, passes: list[bool] = passes) -> None:
            backbone(trainer.model).register_forward_hook(lambda *_: passes.append(trainer.model.training))

        train(run, prepared[1], 1, f"method.gere={settings}", watch=watch)
        assert sum(passes) == 4 * expected


def test_the_base_is_looked_at_once_and_from_any_stage(
    prepared: tuple[Path, Path], first: Path, tmp_path: Path
) -> None:
    """Stage 2 finds the file of stage 1; where it is gone, a fresh base gives the same states, to the bit."""
    before = anchor_files()
    assert len(before) == 1
    one = copy_run(first, tmp_path / "one", "00-base", "01-colour")
    stage = train(one, prepared[1], 2, "method.gere.label_weight=0.0")
    assert anchor_files() == before and logged(stage, "gere_loss")[0] > 0  # the policy has left the base by now
    for path in (Path(os.environ["MCIT_CACHE"]) / "anchors").iterdir():
        path.unlink()
    two = copy_run(first, tmp_path / "two", "00-base", "01-colour")
    again = train(two, prepared[1], 2, "method.gere.label_weight=0.0")
    assert anchor_files() == before and largest_gap(adapter(stage), adapter(again)) == 0


@pytest.mark.parametrize("mode", ["ddp", *(pytest.param(mode, marks=pytest.mark.slow) for mode in ("zero2", "zero3"))])
def test_two_processes_look_at_a_fresh_base_as_one(
    prepared: tuple[Path, Path], first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    """In stage 2, without the file: each process sees a part of the samples, and training is what it was."""
    stages = []
    for name in ("alone", "together"):
        monkeypatch.setenv("MCIT_CACHE", str(tmp_path / "cache" / name))
        run = copy_run(first, tmp_path / name, "00-base", "01-colour")
        if name == "alone":
            stages.append(train(run, prepared[1], 2))
        else:
            launch(run, prepared[1], mode, 2, SMALL)
            stages.append(run / "stages" / "02-again")
    assert largest_gap(*map(adapter, stages)) < 1e-5
    for key in ("loss", "gere_loss"):
        assert logged(stages[0], key) == pytest.approx(logged(stages[1], key), rel=1e-3, abs=1e-6), key
    files = [load_file(next((tmp_path / "cache" / name / "anchors").iterdir())) for name in ("alone", "together")]
    assert torch.equal(files[0]["offsets"], files[1]["offsets"]) and len(files[0]["offsets"]) == 10
    assert (files[0]["rows"] == files[1]["rows"]).float().mean() > 0.999  # units at a threshold may swap
    for kind in ("text", "images"):
        torch.testing.assert_close(files[0][f"thresholds.{kind}"], files[1][f"thresholds.{kind}"])


@pytest.mark.slow
def test_two_processes_replay_the_same_beside_grpo(
    prepared: tuple[Path, Path], first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In passes of their own, as many on both; what was answered differs later on, so the first step is compared."""
    monkeypatch.setenv("PYTHONPATH", f"{Path(__file__).parent}:{os.environ.get('PYTHONPATH', '')}")
    rft = ["train.paradigm=rft", "train.reference=none", "train.global_batch_size=16", "train.rft.args.beta=0.0"]
    rft += [f"train.rft.args.{key}" for key in ("num_generations=4", "max_completion_length=4", "temperature=0.5")]
    rft += ["train.rft.rewards={'rewarding:spread': 1, accuracy: 0, format: 0}"]
    rft += [f"train.rft.args.{key}" for key in ("max_steps=2", "logging_steps=1", "per_device_train_batch_size=4")]
    stages = []
    for name in ("alone", "together"):
        run = copy_run(first, tmp_path / name, "00-base", "01-colour")
        stages.append(run / "stages" / "02-again")
        if name == "alone":
            run_stage(load_recipe(prepared[1], rft), 2, run, "rft", make_rft_trainer)
        else:
            launch(run, prepared[1], "ddp", 2, *rft, script="rft")
    one, two = (logged(stage, "gere_loss") for stage in stages)
    assert len(one) == len(two) == 2 and one[0] == pytest.approx(two[0], rel=1e-4) and one[0] > 0


@pytest.mark.parametrize("match", ["tm", "kl", "l1", "l2"])
def test_the_start_of_a_stage_as_anchor(prepared: tuple[Path, Path], first: Path, tmp_path: Path, match: str) -> None:
    """Nothing has moved at the first step, something has at the second, and the file is gone at the end."""
    before, run = anchor_files(), copy_run(first, tmp_path, "00-base", "01-colour")
    settings = f"{{per_batch: 3, label_weight: 0, weight: 1, match: {match}, anchor: stage_start}}"
    stage = train(run, prepared[1], 2, f"method.gere={settings}")
    losses = logged(stage, "gere_loss")
    assert losses[0] == pytest.approx(0, abs=1e-6) and losses[1] > 1e-6
    assert anchor_files() == before and not list(run.rglob("*safetensors.*")) and not (stage / "method").exists()


def test_methods_together(prepared: tuple[Path, Path], tmp_path: Path) -> None:
    run, method = copy_run(prepared[0], tmp_path, "00-base"), "method={gere: {per_batch: 3}, reglora: {weight: 1}}"
    for k in (1, 2):
        stage = train(run, prepared[1], k, method)
    assert min(logged(stage, "gere_loss")) > 0 and logged(stage, "reglora_loss")[-1] > 0


def test_beside_new_experts_the_base_is_looked_at_without_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_qwen3_vl_moe(tmp_path / "base")
    samples, anchors = {"colour": uneven("colour", 12, 1)}, {"pictures": make_samples("pictures", 4)}
    recipe = make_run(tmp_path / "run", samples, RECIPE, tmp_path / "base", anchors)
    files = []
    for name, more in (("plain", ""), ("experts", ", moextend: {experts: 1, layers: [1], router_steps: 2}")):
        monkeypatch.setenv("MCIT_CACHE", str(tmp_path / "cache" / name))
        stage = train(copy_run(tmp_path / "run", tmp_path / name, "00-base"), recipe, 1, f"method={{gere: {{}}{more}}}")
        files += anchor_files().values()
    assert files[0] == files[1] and logged(stage, "gere_loss")[-1] > 0


def test_labels_alone_need_no_anchor(prepared: tuple[Path, Path], first: Path, tmp_path: Path) -> None:
    before, run = anchor_files(), copy_run(prepared[0], tmp_path, "00-base")
    stage = train(run, prepared[1], 1, "method.gere={weight: 0, per_batch: 3}")
    assert anchor_files() == before and logged(stage, "gere_loss")[0] > 0


def test_a_head_that_is_not_all_there_is_to_the_logits_is_refused(prepared: tuple[Path, Path], tmp_path: Path) -> None:
    run = copy_run(prepared[0], tmp_path, "00-base")

    def watch(trainer: Any) -> None:
        def scaled(module: Any, args: Any, output: Any) -> Any:
            if getattr(output, "logits", None) is not None:
                output.logits = output.logits * 2
            return output

        trainer.model.get_base_model().register_forward_hook(scaled)

    with pytest.raises(InputError, match=r"method.gere: the logits of Qwen2_5_VLFor.* are not its output layer's"):
        train(run, prepared[1], 1, watch=watch)
