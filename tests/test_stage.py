"""Whole stages: real trainers, real files. What holds for every method is in test_invariants.py."""

import dataclasses
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from training import TINY, assert_same_curves, largest_gap, launch, make_run, make_samples, tiny_model, uneven
from trl import GRPOConfig, SFTConfig

import mcit.recipes
from mcit.data_prep.errors import InputError
from mcit.data_prep.files import read_json, read_jsonl
from mcit.eval.lora import load_adapter
from mcit.eval.serving import read_serving
from mcit.pipeline.methods.keys import unpack
from mcit.pipeline.recipe.loading import load_recipe, write_recipe
from mcit.pipeline.sft import make_trainer
from mcit.pipeline.stage.stage import main, replace_folder, run_stage
from mcit.pipeline.training.arguments import OWNED, split_batch

RECIPE = """
method: {reglora: {key_fraction: 0.02, weight: 100}}
train:
  lora: {r: 4, alpha: 8, dropout: 0}
  global_batch_size: 8
  sft: {args: {learning_rate: 0.2, lr_scheduler_type: constant, optim: sgd, logging_steps: 1, num_train_epochs: 2,
               gradient_checkpointing: false}}
"""


def train(run: Path, recipe: Path, k: int, *overrides: str) -> PeftModel:
    """Train a stage in this process; the model as training left it."""
    kept: dict[str, Any] = {}

    def make(entered: Any) -> Any:
        kept["model"] = entered.model
        return make_trainer(entered)

    run_stage(load_recipe(recipe, overrides), k, run, "sft", make)
    return kept["model"].eval()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run whose first stage is trained."""
    run = tmp_path_factory.mktemp("run")
    recipe = make_run(run, {"colour": uneven("colour", 20, 1), "words": uneven("words", 19, 0)}, RECIPE)
    train(run, recipe, 1)
    return run, recipe


def copy_run(trained: tuple[Path, Path], to: Path) -> Path:
    """A run of its own that shares data and first stage."""
    (to / "stages").mkdir(parents=True)
    (to / "data").symlink_to(trained[0] / "data")
    for name in ("00-base", "01-colour"):
        (to / "stages" / name).symlink_to(trained[0] / "stages" / name)
    return to


def second_adapter(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "stages" / "02-words" / "adapter" / "adapter_model.safetensors")


IDS = torch.tensor([[10, 20, 30, 40, 50]])


@pytest.mark.parametrize("lineage", ["stack", "fold"])
def test_two_stages(trained: tuple[Path, Path], tmp_path: Path, lineage: str) -> None:
    run, recipe = copy_run(trained, tmp_path), trained[1]
    model = train(run, recipe, 2, f"train.lineage={lineage}")
    stage = run / "stages" / "02-words"
    assert {path.name for path in (run / "stages").iterdir()} == {"00-base", "01-colour", "02-words"}

    with torch.no_grad():
        served = PeftModel.from_pretrained(tiny_model(), stage / "adapter").eval()(input_ids=IDS).logits
        torch.testing.assert_close(served, model(input_ids=IDS).logits, rtol=0, atol=1e-4)
        before = PeftModel.from_pretrained(tiny_model(), run / "stages" / "01-colour" / "adapter").eval()
        with model.disable_adapter():
            torch.testing.assert_close(model(input_ids=IDS).logits, before(input_ids=IDS).logits, rtol=0, atol=1e-4)

    serving = read_serving(stage)
    assert (serving.stage, serving.name, serving.kind, serving.path, serving.rank) == (
        2,
        "words",
        "adapter",
        "adapter",
        8,
    )
    assert serving.base == str(TINY) and serving.base_hash == "b"
    assert serving.hash != read_serving(run / "stages" / "01-colour").hash
    delta, state = load_adapter(stage / "delta"), load_file(stage / "method" / "reglora.safetensors")
    assert {factors.a.shape[0] for factors in delta.values()} == {4} and state.keys() == delta.keys()
    before = load_file(run / "stages" / "01-colour" / "method" / "reglora.safetensors")
    for name, factors in delta.items():
        keys, counts = (unpack(packed[name], 4, factors.a.shape[1]) for packed in (before, state))
        k = int(0.02 * counts.numel())
        assert keys.sum() == k and counts.sum() == 2 * k and (counts >= keys).all()
        top = factors.delta().abs().flatten().topk(k).indices
        assert ((counts - keys).flatten()[top] == 1).all()
    log = read_jsonl(stage / "train_log.jsonl")
    assert [row["step"] for row in log] == [1, 2, 3, 4, 5, 6, 6]  # 19 samples fill three batches of 8, twice
    assert log[0]["reglora_loss"] == 0 and log[2]["reglora_loss"] > 0 and "train_loss" in log[-1]
    summary = read_json(stage / "trained.json")
    assert (summary["steps"], summary["samples"], summary["processes"], summary["mode"]) == (6, 19, 1, "single")


def test_another_attention_trains_the_same(trained: tuple[Path, Path], tmp_path: Path) -> None:
    runs = {name: copy_run(trained, tmp_path / name) for name in ("sdpa", "eager")}
    for name, run in runs.items():
        model = train(run, trained[1], 2, f"train.attention={name}")
        assert model.get_base_model().get_decoder().config._attn_implementation == name
    assert largest_gap(*(second_adapter(run) for run in runs.values())) < 1e-5
    wrong = r"train.attention: flex_attention: Qwen2_5_VLForConditionalGeneration does not support .* Leave it out"
    with pytest.raises(InputError, match=wrong):
        train(copy_run(trained, tmp_path / "flex"), trained[1], 2, "train.attention=flex_attention")


def test_stack_keeps_the_base_bit_identical(trained: tuple[Path, Path], tmp_path: Path) -> None:
    run, recipe = copy_run(trained, tmp_path), trained[1]
    model = train(run, recipe, 2, "train.lineage=stack")
    state = {
        re.sub(r"^base_model\.model\.|\.base_layer", "", name): tensor
        for name, tensor in model.state_dict().items()
        if "lora_" not in name
    }
    untouched = tiny_model().state_dict()
    assert state.keys() == untouched.keys() and all(torch.equal(state[name], untouched[name]) for name in untouched)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["ddp", "zero3"])
def test_two_processes_that_train_the_tower_are_one(trained: tuple[Path, Path], tmp_path: Path, mode: str) -> None:
    """Its factors are left out by a text-only batch and taken in by the penalty; each asks half of the probes."""
    first = tmp_path / "first"
    (first / "stages").mkdir(parents=True)
    (first / "data").symlink_to(trained[0] / "data")
    (first / "stages" / "00-base").symlink_to(trained[0] / "stages" / "00-base")
    vision = "train.modules.vision=lora"
    train(first, trained[1], 1, vision)
    alone, together = (copy_run((first, trained[1]), tmp_path / name) for name in ("alone", "together"))
    during = [] if mode == "zero3" else ["eval.during={dense: 2}"]
    train(alone, trained[1], 2, vision, *during)
    launch(together, trained[1], mode, 2, vision, *during, "train.sft.args.per_device_train_batch_size=2")
    assert read_json(together / "stages" / "02-words" / "trained.json")["mode"] == mode
    assert largest_gap(second_adapter(alone), second_adapter(together)) < 1e-5
    if during:
        assert_same_curves(alone, together)


@pytest.mark.slow
def test_two_machines_are_one(trained: tuple[Path, Path], tmp_path: Path) -> None:
    """Two launchers by multinode.yaml, which meet on the loopback interface."""
    alone, together = (copy_run(trained, tmp_path / name) for name in ("alone", "together"))
    train(alone, trained[1], 2)
    root = Path(mcit.recipes.__file__).parents[1]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        *(sys.executable, "-m", "accelerate.commands.launch"),
        *("--config_file", str(root / "recipes" / "accelerate" / "multinode.yaml"), "--main_process_port", str(port)),
        *("--machine_rank", "RANK", str(root / "pipeline" / "sft.py")),
        *("--recipe", str(trained[1]), "--stage", "2", "--run-dir", str(together)),
    ]
    machines = [
        subprocess.Popen(
            [rank if word == "RANK" else word for word in command], env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        for rank in "01"
    ]
    assert [machine.wait(400) for machine in machines] == [0, 0]
    summary = read_json(together / "stages" / "02-words" / "trained.json")
    assert (summary["processes"], summary["mode"]) == (2, "ddp")
    assert largest_gap(second_adapter(alone), second_adapter(together)) < 1e-5


def test_an_interrupted_stage_leaves_nothing_that_counts(trained: tuple[Path, Path], tmp_path: Path) -> None:
    run, recipe = copy_run(trained, tmp_path), load_recipe(trained[1])

    class Interrupted(Exception):
        pass

    def make(entered: Any) -> Any:
        trainer = make_trainer(entered)
        trainer.log = lambda *args, **kwargs: (_ for _ in ()).throw(Interrupted)
        return trainer

    with pytest.raises(Interrupted):
        run_stage(recipe, 2, run, "sft", make)
    assert not (run / "stages" / "02-words").exists()
    train(run, trained[1], 2)
    assert {path.name for path in (run / "stages").iterdir()} == {"00-base", "01-colour", "02-words"}


def test_a_training_that_moves_nothing_is_an_error(trained: tuple[Path, Path], tmp_path: Path) -> None:
    run = copy_run(trained, tmp_path)
    with pytest.raises(InputError, match=r"stage words: train.sft.args: training changed no weight. Look at"):
        train(run, trained[1], 2, "train.sft.args.learning_rate=0.0")
    with pytest.raises(InputError, match=r"stage words: train.sft.args: the loss is nan at step \d. Lower the"):
        train(run, trained[1], 2, "train.sft.args.learning_rate=1e30", "train.sft.args.max_grad_norm=0.0")
    assert not (run / "stages" / "02-words").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.sft.args.learning_rat=1"], "train.sft.args.learning_rat: SFTConfig has no such argument. Did you mean "
         "`learning_rate`?"),
        (["train.sft.args.packing=true"], "train.sft.args.packing: is set by the pipeline. Set train.packing"),
        (["train.sft.args.bf16=true"], "Set base_model.dtype"),
        (["train.sft.args.per_device_train_batch_size=3"], "global_batch_size: 8 does not divide by 1 process × 3"),
        (["train.sft.args.lr_scheduler_type=cosin"], "train.sft.args: .*cosin"),
        (["train.max_length=20"], "sample words-\\d+ of words: takes \\d+ tokens, .* 20 fit"),
        (["train.paradigm=rft", "train.reference=none"], "stage 2 is rft, and this is pipeline/sft.py"),
    ],
)  # fmt: skip
def test_mistakes_are_one_clear_line(
    trained: tuple[Path, Path], tmp_path: Path, overrides: list[str], message: str
) -> None:
    run = copy_run(trained, tmp_path)
    with pytest.raises(InputError, match=message) as caught:
        train(run, trained[1], 2, *overrides)
    assert "\n" not in str(caught.value)
    assert not (run / "stages" / "02-words").exists()


def test_stage_numbers(trained: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--stage: the stream has stages 1 to 2, not 3"):
        train(tmp_path, trained[1], 3)
    with pytest.raises(InputError, match=r"01-colour.serving.json: no such file"):
        train(tmp_path, trained[1], 2)


def test_split_batch() -> None:
    assert split_batch(128, 1, None) == (128, 1)
    assert split_batch(128, 4, None) == (32, 1)
    assert split_batch(128, 4, 8) == (8, 4)
    with pytest.raises(InputError, match="128 does not divide by 3 processes"):
        split_batch(128, 3, None)


def test_replace_folder(tmp_path: Path) -> None:
    for name in ("new", "old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(json.dumps(name))
    replace_folder(tmp_path / "new", tmp_path / "old")
    assert [path.name for path in tmp_path.iterdir()] == ["old"] and read_json(tmp_path / "old" / "file") == "new"


def test_owned_arguments_exist_in_trl() -> None:
    """A renamed argument would go through unseen."""
    known = {field.name for config in (SFTConfig, GRPOConfig) for field in dataclasses.fields(config)}
    assert set(OWNED) <= known


def test_the_script_takes_a_run_up_where_it_is_on_one_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {}

    def stage(recipe: Any, k: int, run_dir: Path, *_: Any) -> None:
        seen.update(run_dir=run_dir, gpus=os.environ["CUDA_VISIBLE_DEVICES"])

    write_recipe(load_recipe("mini/sequential"), tmp_path / "recipe.yaml")
    monkeypatch.setattr("mcit.pipeline.stage.stage.run_stage", stage)
    monkeypatch.setattr(sys, "argv", ["sft.py", "--recipe", str(tmp_path), "--stage", "1"])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    main("sft", make_trainer)
    assert seen == {"run_dir": tmp_path, "gpus": "2"}


def test_workers_of_the_data_loader_change_nothing_but_speed(tmp_path: Path) -> None:
    logs = []
    for workers in (0, 2):
        run = tmp_path / str(workers)
        recipe = make_run(run, {"colour": make_samples("colour", 12, images=1)}, RECIPE)
        train(run, recipe, 1, f"train.sft.args.dataloader_num_workers={workers}")
        logs.append(load_file(run / "stages" / "01-colour" / "delta" / "adapter_model.safetensors"))
    assert all(torch.equal(tensor, logs[1][name]) for name, tensor in logs[0].items())
