"""Tasks that re-occur at random and blurred boundaries: what is trained where, and that metrics stay defined."""

from collections import Counter
from pathlib import Path

import pytest
from training import make_run, make_samples

from mcit.data_prep.errors import InputError
from mcit.data_prep.files import read_json
from mcit.eval.cells import needed_cells
from mcit.eval.metrics import continual_metrics
from mcit.pipeline.recipe.loading import dump_recipe, load_recipe, write_recipe
from mcit.pipeline.recipe.schedule import RecurConfig, trained_in
from mcit.pipeline.recipe.schema import Recipe
from mcit.pipeline.sft import make_trainer
from mcit.pipeline.stage.stage import run_stage

NAMES = ["a", "b", "c", "d"]


def recipe(tmp_path: Path, *overrides: str) -> Recipe:
    tasks = "".join(f"  - {{name: {name}, train: {name}.json}}\n" for name in NAMES)
    (tmp_path / "r.yaml").write_text(f"name: r\nbase_model: {{path: acme/tiny}}\nstream:\n{tasks}")
    return load_recipe(tmp_path / "r.yaml", overrides)


def test_recurring_tasks_follow_from_the_seed_and_are_learned_once(tmp_path):
    loaded = recipe(tmp_path, "recur={stages: 20}", "seed=3")
    stages = [stage.tasks for stage in loaded.stages]
    assert len(stages) == 20 and all(len(tasks) == 1 for tasks in stages)
    assert stages == [stage.tasks for stage in recipe(tmp_path, "recur={stages: 20}", "seed=3").stages]
    assert stages != [stage.tasks for stage in recipe(tmp_path, "recur={stages: 20}", "seed=4").stages]
    assert sorted(task.name for task in loaded.tasks) == NAMES
    for name, k in loaded.learned.items():
        assert stages.index([name]) + 1 == k
    write_recipe(loaded, tmp_path / "run" / "recipe.yaml")
    again = load_recipe(tmp_path / "run")
    assert dump_recipe(again) == dump_recipe(loaded) and again.stages == loaded.stages


def test_metrics_of_recurring_tasks_are_defined(tmp_path):
    loaded = recipe(tmp_path, "recur={stages: 12, tasks: 2}", "seed=1")
    assert all(len(set(stage.tasks)) == 2 for stage in loaded.stages)
    cells = needed_cells("metrics", 12, loaded.learned)
    matrix = [[50.0 if (k, task.name) in cells else None for task in loaded.tasks] for k in range(13)]
    found = continual_metrics(matrix, learned=[loaded.learned[task.name] for task in loaded.tasks], row0=True)
    assert found["MFT"] == found["MFN"] == 50 and found["BWT"] == 0


def test_a_power_law_draws_the_first_tasks_more_often():
    def counts(exponent: float) -> Counter[str]:
        config = RecurConfig(stages=4000, exponent=exponent)
        return Counter(name for stage in config.draw(NAMES, seed=0) for name in stage)

    even, zipf = counts(0), counts(1)
    assert all(900 < even[name] < 1100 for name in NAMES)
    for n, name in enumerate(NAMES, 1):
        assert zipf[name] == pytest.approx(4000 / n / (1 + 1 / 2 + 1 / 3 + 1 / 4), rel=0.1)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["recur={stages: 2}"], r"^command line: recur: .* would not occur in 2 stages under seed 0. Ask for more"),
        (["recur={stages: 9, tasks: 5}"], "command line: recur.tasks: 5 tasks a stage, and the stream has 4"),
        (["recur={stages: 9}", "stream=[{name: a, train: x}, a]"], "the stream is no plain list of tasks"),
        (["recur={stage: 9}"], "command line: recur.stage: unknown key. Did you mean `stages`?"),
        (["blur=1"], "command line: blur: Input should be less than 1"),
    ],
)
def test_schedules_that_cannot_be_are_refused(overrides, message, tmp_path):
    with pytest.raises(InputError, match=message) as error:
        recipe(tmp_path, *overrides)
    assert "\n" not in str(error.value)


def test_every_sample_is_trained_once_and_a_share_of_them_elsewhere():
    samples = make_samples("a", 2000)
    parts = {k: trained_in(samples, k, [2], 5, 0.3, seed=0) for k in range(1, 6)}
    assert Counter(s["id"] for part in parts.values() for s in part) == Counter(s["id"] for s in samples)
    assert len(parts[2]) == pytest.approx(1400, abs=80)
    assert all(len(parts[k]) == pytest.approx(150, abs=50) for k in (1, 3, 4, 5))
    assert parts[1] == trained_in(samples, 1, [2], 5, 0.3, seed=0) != trained_in(samples, 1, [2], 5, 0.3, seed=1)
    assert trained_in(samples, 2, [2], 5, 0, seed=0) == samples and trained_in(samples, 1, [2], 5, 0, seed=0) == []
    assert trained_in(samples, 1, [1], 1, 0.9, seed=0) == samples  # there is nowhere else


def test_a_blurred_stage_trains_its_visitors(tmp_path):
    tasks = {"one": make_samples("one", 16), "two": make_samples("two", 16)}
    settings = """
blur: 0.4
train:
  lora: {r: 4, alpha: 8, dropout: 0}
  global_batch_size: 8
  sft: {args: {learning_rate: 0.01, lr_scheduler_type: constant, gradient_checkpointing: false}}
"""
    path = make_run(tmp_path / "run", tasks, settings)
    loaded = load_recipe(path)
    assert [(stage.tasks, stage.visitors) for stage in loaded.stages] == [(["one"], ("two",)), (["two"], ("one",))]
    assert loaded.learned == {"one": 1, "two": 2}
    seen: list[dict[str, int]] = []

    def make(entered):
        seen.append(Counter(sample["task"] for sample in entered.samples))
        return make_trainer(entered)

    for stage in loaded.stages:
        run_stage(loaded, stage.k, tmp_path / "run", "sft", make)
        trained = read_json(tmp_path / "run" / "stages" / stage.folder / "trained.json")
        assert trained["samples"] == sum(seen[-1].values())
    assert seen[0]["two"] > 0 and seen[1]["one"] > 0
    assert seen[0] + seen[1] == Counter(one=16, two=16)
