"""What a frozen tower makes of pictures, remembered: the same features, losses and weights; never more than fits."""

from functools import wraps
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES
from safetensors.torch import load_file
from torch import Tensor
from training import COLOURS, largest_gap, make_run, make_samples, write_images
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.modeling_outputs import BaseModelOutputWithPooling

import mcit.pipeline.rft as rft
import mcit.pipeline.sft as sft
from mcit.data_prep.errors import InputError
from mcit.data_prep.files import read_jsonl
from mcit.pipeline.recipe.loading import load_recipe
from mcit.pipeline.stage.stage import run_stage
from mcit.pipeline.training.arguments import check_mode, check_modules
from mcit.pipeline.training.collator import Collator
from mcit.pipeline.training.pictures import remember_pictures, remembered
from mcit.pipeline.training.replay import backbone


@pytest.mark.parametrize(
    "family",
    ["qwen3_vl", *(pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES if name != "qwen3_vl")],
)
@torch.no_grad()
def test_what_is_remembered_is_what_the_tower_made(family: str, tmp_path: Path) -> None:
    """Across batches of other pictures, in another order, one of them twice; layer by layer where there are several."""
    write_images(tmp_path)
    FAMILIES[family](tmp_path / family)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / family, dtype=torch.float32)
    collator = Collator(AutoProcessor.from_pretrained(tmp_path / family), [], 1000)
    samples = make_samples("colour", len(COLOURS))
    for sample, colour in zip(samples, COLOURS, strict=True):
        sample["images"] = [str(tmp_path / "images" / f"{colour}-0.png")]
    batches = [collator.collate([samples[i] for i in chosen]) for chosen in ((0, 1), (1, 2, 1, 0), (2, 3, 0), (3, 2))]
    wanted = [model(**batch, use_cache=False).logits for batch in batches]
    encoded: list[int] = []
    features = backbone(model).get_image_features

    @wraps(features)
    def counted(*args: Any, **kwargs: Any) -> Any:
        output = features(*args, **kwargs)
        encoded.append(len(output.pooler_output))
        return output

    backbone(model).get_image_features = counted
    remember_pictures(model, 2**30)
    if family == "idefics3":  # it takes tiles of pictures apart, and drops those that only fill a row up
        wrong = r"train.picture_cache: does not work for models that look at pixel_attention_mask. Leave it out"
        with pytest.raises(InputError, match=wrong):
            model(**batches[0], use_cache=False)
        return
    for batch, logits in zip(batches, wanted, strict=True):
        torch.testing.assert_close(model(**batch, use_cache=False).logits, logits, rtol=1e-5, atol=1e-5)
    assert encoded == [2, 1, 1]


def test_what_was_not_asked_for_longest_is_forgotten_first() -> None:
    seen: list[list[int]] = []

    def features(pixel_values: Tensor, **kwargs: Any) -> Any:
        seen.append([int(picture[0, 0]) for picture in pixel_values])
        return BaseModelOutputWithPooling(pooler_output=pixel_values * 2)

    one = torch.ones(1, 2, 3)
    remember = remembered(features, room=2 * one.nbytes)

    def ask(*pictures: int) -> None:
        pixels = torch.cat([one * picture for picture in pictures])
        torch.testing.assert_close(remember(pixel_values=pixels).pooler_output, pixels * 2)

    ask(1, 2)
    ask(1)
    ask(3)  # 2 goes
    ask(1, 3)
    ask(2, 4, 5)  # more than there is room for, all the same
    ask(4)
    ask(2)
    assert seen == [[1, 2], [3], [2, 4, 5], [2]]


def test_pictures_of_equal_pixels_but_another_shape_are_others() -> None:
    def features(pixel_values: Tensor, image_grid_thw: Tensor) -> Any:
        parts = pixel_values.split(image_grid_thw.prod(-1).tolist())
        return BaseModelOutputWithPooling(
            pooler_output=[part + grid[1] for part, grid in zip(parts, image_grid_thw, strict=True)]
        )

    remember, pixels = remembered(features, 2**20), torch.ones(8, 3)
    for height in (2, 4, 2):
        [made] = remember(pixel_values=pixels, image_grid_thw=torch.tensor([[1, height, 8 // height]])).pooler_output
        assert made[0, 0] == 1 + height


RECIPE = """
train:
  lora: {r: 4, alpha: 8, dropout: 0}
  global_batch_size: 8
  reference: base
  sft: {args: {learning_rate: 0.1, lr_scheduler_type: constant, optim: sgd, logging_steps: 1, num_train_epochs: 2,
               gradient_checkpointing: false}}
  rft: {args: {beta: 0.1, num_generations: 4, max_completion_length: 6, learning_rate: 0.1, optim: sgd, max_steps: 4,
               logging_steps: 1},
        rewards: {"test_pictures:length": 1.0}}
"""


def length(text: str, references: Any, sample: Any) -> float:
    return len(text) % 7


@pytest.mark.parametrize(("phase", "make"), [("sft", sft.make_trainer), ("rft", rft.make_trainer)])
def test_a_stage_that_remembers_pictures_learns_the_same(phase: Any, make: Any, tmp_path: Path) -> None:
    """Of 16 samples on four pictures, each picture goes through the tower once in the whole stage."""
    logs, weights, encoded = [], [], []
    for room in (0, 1):
        run = tmp_path / str(room)
        recipe = make_run(run, {"colour": make_samples("colour", 16)}, RECIPE)
        counts: list[int] = []

        def watched(entered: Any, counts: list[int] = counts) -> Any:
            tower = entered.model.get_base_model().model.visual
            tower.register_forward_hook(lambda *_, **__: counts.append(1))
            return make(entered)

        overrides = [f"train.paradigm={phase}", f"train.picture_cache={room}"]
        run_stage(load_recipe(recipe, overrides), 1, run, phase, watched)
        logs.append(
            [row["loss"] for row in read_jsonl(run / "stages" / "01-colour" / "train_log.jsonl") if "loss" in row]
        )
        weights.append(load_file(run / "stages" / "01-colour" / "adapter" / "adapter_model.safetensors"))
        encoded.append(len(counts))
    assert logs[0] == pytest.approx(logs[1], rel=1e-4, abs=1e-6) and len(logs[0]) == 4
    assert largest_gap(*weights) < 1e-5
    assert encoded[0] >= 4 and encoded[1] < encoded[0] and encoded[1] <= 4


def test_rewards_are_not_earned_under_a_base_that_saw_other_pictures(tmp_path: Path) -> None:
    """An earlier stage trained the tower: with its increments the base would remember what it never made."""
    recipe = make_run(tmp_path, {name: make_samples(name, 8) for name in ("first", "second")}, RECIPE)
    run_stage(load_recipe(recipe, ["train.modules.vision=lora"]), 1, tmp_path, "sft", sft.make_trainer)
    overrides = ["train.paradigm=rft", "train.picture_cache=1"]
    with pytest.raises(InputError, match=r"train.picture_cache: an earlier stage has trained the tower"):
        run_stage(load_recipe(recipe, overrides), 2, tmp_path, "rft", rft.make_trainer)


def test_where_pictures_are_not_remembered(tmp_path: Path) -> None:
    recipe = load_recipe("mini/sequential", ["train.picture_cache=1"])
    [stage, *_] = recipe.stages
    check_mode(recipe, stage, [], "zero2")
    with pytest.raises(InputError, match=r"train.picture_cache: does not run under zero3"):
        check_mode(recipe, stage, [], "zero3")
    trained = load_recipe("mini/sequential", ["train.picture_cache=1", "train.modules.projector=lora"])
    with pytest.raises(InputError, match=r"train.picture_cache: is for a tower and a projector that are frozen"):
        check_modules(trained.stages[0].train)
