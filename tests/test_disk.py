"""What a stage is said to need on disk, against what it takes, and what is refused."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from training import TINY, make_run, tiny_model, uneven
from transformers import AutoConfig, AutoModelForImageTextToText

import mcit.pipeline.sft as sft
from mcit.data_prep.errors import InputError
from mcit.pipeline.methods import build_methods
from mcit.pipeline.planning.outlook import look_ahead, look_through
from mcit.pipeline.recipe.loading import load_recipe
from mcit.pipeline.recipe.schema import Recipe
from mcit.pipeline.run.disk import Needs, check_run, run_needs, size, stage_needs
from mcit.pipeline.stage.stage import run_stage

RECIPE = """
method: {reglora: {}}
train: {lora: {r: 64, alpha: 64}, global_batch_size: 4, checkpoint_every: 1, sft: {args: {max_steps: 3}}}
"""


def taken(folder: Path, *names: str) -> int:
    return sum(file.stat().st_size for name in names for file in (folder / name).rglob("*") if file.is_file())


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Recipe]:
    run = tmp_path_factory.mktemp("run")
    recipe = make_run(run, {name: uneven(name, 4, 0) for name in ("one", "two")}, RECIPE)
    return run, load_recipe(recipe)


def test_a_stage_takes_what_was_said(run: tuple[Path, Recipe], monkeypatch: pytest.MonkeyPatch) -> None:
    """Within a tenth, and checkpoints never more."""
    folder, recipe = run
    largest = [0]
    trainer = sft.StageSFTTrainer

    class Watched(trainer):  # type: ignore[valid-type,misc]
        def _save_checkpoint(self, *args: Any) -> None:
            super()._save_checkpoint(*args)
            largest[0] = max(largest[0], taken(self.checkpoints.folder, "."))

    monkeypatch.setattr(sft, "StageSFTTrainer", Watched)
    methods = build_methods(recipe.method, recipe.stages[0].train)
    for stage, before in zip(recipe.stages, (0, 64), strict=True):
        run_stage(recipe, stage.k, folder, "sft", sft.make_trainer)
        said = stage_needs(look_ahead(stage, tiny_model(), before, stage.k - 1), methods)
        assert said.kept == pytest.approx(taken(folder / "stages" / stage.folder, "adapter", "delta", "method"), 0.1)
        assert largest[0] < said.work < 2.5 * largest[0]


def test_a_run_is_its_stages(run: tuple[Path, Recipe]) -> None:
    recipe = run[1]
    methods = build_methods(recipe.method, recipe.stages[0].train)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(TINY), dtype=torch.float32)
    both = list(look_through(recipe, model, 0, 0))
    one, two = (
        stage_needs(look_ahead(stage, tiny_model(), before, stage.k - 1), methods)
        for stage, before in zip(recipe.stages, (0, 64), strict=True)
    )
    assert run_needs(recipe, both) == Needs(one.kept + two.kept, max(one.work, two.work))
    assert run_needs(recipe, both[1:]) == two


def test_what_does_not_fit_is_refused_in_one_line(
    run: tuple[Path, Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 5000, 5000))
    with pytest.raises(
        InputError, match=r"the run needs [\d.]+ MB of disk \(.* to keep, .* for checkpoints\), and 5 kB"
    ):
        check_run(tmp_path, run[1], AutoConfig.from_pretrained(TINY), [])
    with pytest.raises(InputError, match=r"stage 2 needs .* of disk") as error:
        run_stage(load_recipe(run[0] / "recipe-under-test.yaml", ["seed=1"]), 2, run[0], "sft", sft.make_trainer)
    assert "\n" not in str(error.value)


def test_sizes_for_people() -> None:
    assert [size(number) for number in (5, 1200, 34_500_000, 7.2e10, 1e14)] == [
        "5 B",
        "1.2 kB",
        "34.5 MB",
        "72 GB",
        "100 TB",
    ]
