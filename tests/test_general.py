"""General ability: the columns beside the stream, GeRe's F1, and the recipes that name them."""

from pathlib import Path

import pytest

from mcit.data_prep.errors import InputError
from mcit.data_prep.mini import facts
from mcit.data_prep.prepare import prepare_task, read_samples
from mcit.data_prep.schema import PrepareConfig
from mcit.eval.cells import needed_cells
from mcit.eval.general import general_ability, general_metrics, harmonic_mean
from mcit.eval.scorers import get_scorer
from mcit.eval.scoring import score_gold
from mcit.pipeline.recipe.loading import dump_recipe, load_recipe, write_recipe
from mcit.pipeline.recipe.probes import load_probe


@pytest.mark.parametrize(
    ("mmlu", "ap", "expected"), [(60.7155, 74.0817, 66.7359), (66.2539, 64.4417, 65.3352), (0, 0, 0), (None, 5, None)]
)
def test_the_f1_of_gere_is_what_its_paper_prints(mmlu, ap, expected) -> None:
    assert harmonic_mean(mmlu, ap) == (None if expected is None else pytest.approx(expected, abs=1e-4))


def test_general_columns_by_hand() -> None:
    cells = [
        [{"score": 90.0, "stderr": 1.0, "n": 4, "nll": 0.2}, {"score": 70.0, "stderr": None, "n": 4, "nll": 0.4}],
        [{"score": 60.0, "stderr": 1.0, "n": 4, "nll": 1.0}, None],
        [{"score": 40.0, "stderr": 1.0, "n": 4, "nll": 1.0}, {"score": 20.0, "stderr": 1.0, "n": 4, "nll": 2.0}],
    ]
    found = general_ability([], cells, [[0.0, 10.0], [80.0, 5.0], [50.0, 70.0]], [1, 2])
    assert found["matrix"] == [[90, 70], [60, None], [40, 20]] and found["nll"][1] == [1.0, None]
    assert found["mean"] == [80, None, 30] and found["mean_nll"] == [pytest.approx(0.3), None, 1.5]
    assert found["f1"] == [None, None, pytest.approx(2 * 30 * 60 / 90)]  # the stream: (50 + 70) / 2
    assert general_metrics(found) == {
        "general": 30, "general_base": 80, "general_nll": 1.5, "general_F1": pytest.approx(40)
    }  # fmt: skip


@pytest.mark.parametrize(
    ("which", "rows"), [("full", [0, 1, 2]), ("metrics", [0, 1, 2]), ("seen", [1, 2]), ("last", [2])]
)
def test_general_tasks_are_asked_wherever_anything_is(which, rows) -> None:
    cells = needed_cells(which, 2, {"a": 1, "b": 2}, ("pope",))
    assert [k for k, task in cells if task == "pope"] == rows


def test_the_facts_of_the_mini_stream(tmp_path) -> None:
    """Gold answers are all right for the scorer; no style or fact is missing, and none comes much more often."""
    folder = prepare_task(
        load_probe("facts"), PrepareConfig(), seed=0, asd=None, base_dir=tmp_path, cache=tmp_path / "cache"
    )
    samples = read_samples(folder, "test")
    assert len(samples) == facts.HELD_OUT and not read_samples(folder, "train")
    assert all(score_gold(sample, get_scorer("short"))["verdict"] == "correct" for sample in samples)
    assert {sample["style"] for sample in samples} == {"short", "mcq", "yes_no", "brief", "number", "latex"}
    assert {sample["reasoning"] for sample in samples} == {"none", "think"}
    known = {fact.name for source in facts.SOURCES for fact in source(facts.np.random.default_rng(0))[1]}
    assert {sample["meta"]["fact"] for sample in samples} == known - {"box_of_shape", "box_of_bar"}


def test_a_probe_is_named_changed_or_one_s_own(tmp_path: Path) -> None:
    (tmp_path / "mine.jsonl").write_text("")
    (tmp_path / "recipe.yaml").write_text(
        "name: r\nbase_model: {path: m/m}\nstream: [{name: a, train: a.json}]\n"
        "eval: {general: [mmmu, {name: pope, data: POPE}, {name: mine, test: mine.jsonl, style: short}]}\n"
    )
    recipe = load_recipe(tmp_path / "recipe.yaml")
    mmmu, pope, mine = recipe.eval.general
    assert mmmu.data == "hub:MMMU/MMMU" and mmmu.test == "*/validation-*.parquet"
    assert pope.data is None and pope.test == str(tmp_path / "POPE" / "data" / "test-*.parquet")
    assert pope.scorer == "yes_no" and mine.test == str(tmp_path / "mine.jsonl")
    assert [task.name for task in recipe.sources] == ["a", "mmmu", "pope", "mine"]
    assert [task.name for task in recipe.tasks] == ["a"] and "pope" not in recipe.learned
    write_recipe(recipe, tmp_path / "run" / "recipe.yaml")
    assert dump_recipe(load_recipe(tmp_path / "run"))["eval"] == dump_recipe(recipe)["eval"]


@pytest.mark.parametrize(
    ("general", "message"),
    [
        ("[pop]", r"eval.general: no such probe: pop. Did you mean `pope`\?"),
        ("[{name: a, test: b.json}]", "eval.general.a: the name a is taken"),
        ("[{name: pope, datta: x}]", "datta"),
        ("pope", "eval.general"),
    ],
)
def test_bad_general_tasks_are_refused(tmp_path: Path, general: str, message: str) -> None:
    (tmp_path / "recipe.yaml").write_text(
        f"name: r\nbase_model: {{path: m/m}}\nstream: [{{name: a, train: a.json}}]\neval: {{general: {general}}}\n"
    )
    with pytest.raises(InputError, match=message):
        load_recipe(tmp_path / "recipe.yaml")
