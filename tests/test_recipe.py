"""Recipes: reading, merging, overriding, resolving, and refusing in one line."""

import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest
import yaml
from pydantic import BaseModel

from mcit.data_prep.errors import InputError
from mcit.eval.cells import needed_cells
from mcit.eval.metrics import continual_metrics
from mcit.pipeline.recipe.layers import RECIPES
from mcit.pipeline.recipe.loading import dump_recipe, load_recipe, write_recipe
from mcit.pipeline.recipe.schema import Recipe
from mcit.pipeline.recipe.text import parse_yaml, to_yaml
from mcit.pipeline.run import inputs
from mcit.pipeline.run.runner import start_run
from mcit.pipeline.run.step import Launch
from mcit.pipeline.run.terminal import Terminal

SMALL = """
name: small
base_model: {path: acme/tiny}
stream:
  - {name: a, train: a.json}
  - {name: b, train: sub/b.jsonl, test: 0.2}
"""


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    return path


def refusal(*args, **kwargs) -> str:
    """The one line with which a recipe is refused."""
    with pytest.raises(InputError) as error:
        load_recipe(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


# --- YAML -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2e-4", 2e-4),
        ("1.5", 1.5),
        (".5", 0.5),
        ("-3", -3),
        ("true", True),
        ("null", None),
        ("", None),
        ("no", "no"),
        ("on", "on"),
        ("1:30", "1:30"),
        ("2024-01-01", "2024-01-01"),
        ("1e", "1e"),
        ("'7'", "7"),
    ],
)
def test_yaml_has_the_core_types_of_version_1_2(text, value):
    found = parse_yaml(text, "here")
    assert found == value and type(found) is type(value)


def test_yaml_text_survives_writing_and_reading():
    value = {"a": "2e-4", "b": 2e-4, "c": "no", "d": "true", "e": ["1", 1, None, "null", ""], "f": {}, "g": 1e-7}
    assert parse_yaml(to_yaml(value), "here") == value


def test_a_key_given_twice_is_refused_with_its_place():
    with pytest.raises(InputError, match=r"^r\.yaml:2:1: malformed YAML: the key `a` is given twice$"):
        parse_yaml("a: 1\na: 2\n", "r.yaml")


def test_malformed_yaml_names_line_and_column(tmp_path):
    (tmp_path / "r.yaml").write_text("name: x\nstream: [a, b\n")
    assert refusal(tmp_path / "r.yaml").startswith(f"{tmp_path / 'r.yaml'}:3:1: malformed YAML")
    (tmp_path / "r.yaml").write_text("name: x\nbase_model: {path: {{ DATA }}}\n")
    assert "a list or mapping is no key: put quotes around" in refusal(tmp_path / "r.yaml")


# --- Files, extends, named recipes ------------------------------------------------------------------------------------


def test_paths_are_relative_to_the_file_that_wrote_them(recipe_file, tmp_path, monkeypatch):
    (tmp_path / "child").mkdir()
    (tmp_path / "child" / "model").mkdir()
    child = tmp_path / "child" / "c.yaml"
    child.write_text("extends: ../small.yaml\nname: child\nbase_model: {path: model}\n")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    recipe = load_recipe(child, ["stream.b.test=t.json"])
    assert recipe.task("a").train == str(tmp_path / "a.json")
    assert recipe.task("b").train == str(tmp_path / "sub" / "b.jsonl")
    assert recipe.task("b").test == str(tmp_path / "elsewhere" / "t.json")
    assert recipe.base_model.path == str(tmp_path / "child" / "model")
    assert recipe.folder == str(tmp_path / "child")


def test_hub_ids_and_module_functions_are_no_paths(recipe_file):
    recipe = load_recipe(recipe_file, ["stream.a.train=my_pkg.readers:mine"])
    assert recipe.base_model.path == "acme/tiny"
    assert recipe.task("a").train == "my_pkg.readers:mine"
    assert load_recipe(recipe_file, ["base_model.path=./tiny"]).base_model.path == str(Path.cwd() / "tiny")


def test_the_same_hub_id_is_a_path_where_such_a_folder_exists(recipe_file, tmp_path):
    (tmp_path / "acme" / "tiny").mkdir(parents=True)
    assert load_recipe(recipe_file).base_model.path == str(tmp_path / "acme" / "tiny")


def test_what_a_file_writes_wins_over_what_it_extends_key_by_key(recipe_file, tmp_path):
    child = tmp_path / "c.yaml"
    recipe_file.write_text(SMALL + "train: {lora: {r: 8, alpha: 16}, global_batch_size: 4}\n")
    child.write_text("extends: small.yaml\nname: child\ntrain: {lora: {r: 2}}\n")
    train = load_recipe(child).train
    assert (train.lora.r, train.lora.alpha, train.global_batch_size) == (2, 16, 4)


def test_extends_goes_one_level(recipe_file, tmp_path):
    (tmp_path / "c.yaml").write_text("extends: small.yaml\nname: c\n")
    (tmp_path / "d.yaml").write_text("extends: c.yaml\nname: d\n")
    assert "extends: c.yaml extends another file itself. One level is allowed" in refusal(tmp_path / "d.yaml")
    (tmp_path / "e.yaml").write_text("extends: nowhere.yaml\nname: e\n")
    assert f"{tmp_path / 'e.yaml'}: extends: no such file: nowhere.yaml" in refusal(tmp_path / "e.yaml")


def test_a_recipe_anywhere_extends_a_packaged_one(tmp_path):
    (tmp_path / "mine.yaml").write_text("extends: mini/stream\nname: mine\nstream: [counting, digits]\n")
    recipe = load_recipe(tmp_path / "mine.yaml")
    assert ([task.name for task in recipe.tasks], recipe.base_model.path) == (
        ["counting", "digits"],
        load_recipe("mini/sequential").base_model.path,
    )
    (tmp_path / "mini").mkdir()
    (tmp_path / "mini" / "stream").write_text(SMALL)  # a file beside it goes before what is packaged
    (tmp_path / "mine.yaml").write_text("extends: mini/stream\nname: mine\n")
    assert [task.name for task in load_recipe(tmp_path / "mine.yaml").tasks] == ["a", "b"]


def packaged() -> list[str]:
    files = [file.relative_to(RECIPES).with_suffix("") for file in RECIPES.glob("*/*.yaml")]
    no_recipes = ("methods", "accelerate", "probes")
    return sorted(str(f) for f in files if f.parent.name not in no_recipes and str(f) != "mini/stream")


@pytest.mark.parametrize("name", packaged())
def test_every_packaged_recipe_loads(name):
    recipe = load_recipe(name)
    assert recipe.stages and "/" in recipe.base_model.path


@pytest.mark.parametrize("method", sorted(file.stem for file in (RECIPES / "methods").glob("*.yaml")))
def test_every_method_file_adds_a_method_to_sequential_tuning(method):
    assert load_recipe("mini/sequential", with_methods=[method]).method


def test_a_stream_by_name_is_the_packaged_one(tmp_path):
    (tmp_path / "r.yaml").write_text("name: mine\nbase_model: {path: acme/tiny}\nstream: mini\n")
    assert load_recipe(tmp_path / "r.yaml").tasks == load_recipe("mini/sequential").tasks
    (tmp_path / "r.yaml").write_text("name: mine\nbase_model: {path: acme/tiny}\nstream: minni\n")
    assert refusal(tmp_path / "r.yaml") == f"{tmp_path / 'r.yaml'}: stream: no such stream: minni. Did you mean `mini`?"


# --- Where the data are -----------------------------------------------------------------------------------------------

UNDER_DATA = """
name: bench
data:
base_model: {path: acme/tiny}
stream:
  - {name: a, train: a/train.json, test: a/test.json, images: .}
  - {name: b, data: b-files, train: "train-*.parquet"}
  - {name: c, data: hub:acme/c@v1, train: c.json}
"""


@pytest.fixture
def bench(tmp_path: Path) -> Path:
    (tmp_path / "bench.yaml").write_text(UNDER_DATA)
    return tmp_path / "bench.yaml"


def places(recipe: Recipe) -> list[tuple[str | None, str | None]]:
    return [(task.data, task.train) for task in recipe.tasks]


def test_paths_are_relative_to_data(bench, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "d"
    recipe = load_recipe(bench, ["data=d"])
    assert places(recipe) == [
        (None, f"{root}/a/train.json"),
        (None, f"{root}/b-files/train-*.parquet"),
        ("hub:acme/c@v1", "c.json"),
    ]
    assert (recipe.task("a").test, recipe.task("a").images) == (f"{root}/a/test.json", str(root))
    write_recipe(recipe, tmp_path / "run" / "recipe.yaml")
    assert dump_recipe(load_recipe(tmp_path / "run")) == dump_recipe(recipe)


def test_data_may_be_a_dataset_on_the_hub(bench):
    assert places(load_recipe(bench, ["data=hub:acme/all"])) == [
        ("hub:acme/all", "a/train.json"),
        ("hub:acme/all", "b-files/train-*.parquet"),
        ("hub:acme/c@v1", "c.json"),
    ]
    one = load_recipe(bench, ["data=/d", "stream.b.data=hub:acme/b"])
    assert places(one)[:2] == [(None, "/d/a/train.json"), ("hub:acme/b", "train-*.parquet")]


def test_without_data_a_recipe_can_be_looked_at_and_not_run(bench, tmp_path):
    recipe = load_recipe(bench)
    assert places(recipe)[0] == (None, "a/train.json")
    with pytest.raises(InputError, match=r"^bench: data: is not set, and stream.a.train .*data=FOLDER") as error:
        start_run(recipe, tmp_path / "run", Launch.named("single", None), Terminal())
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


def test_paths_of_a_recipe_that_extends_one_with_data_are_in_it_too(bench, tmp_path):
    (tmp_path / "more.yaml").write_text("extends: bench.yaml\nname: more\nstream: [{name: a, train: a/x20.json}]\n")
    assert places(load_recipe(tmp_path / "more.yaml", ["data=/d"])) == [(None, "/d/a/x20.json")]
    (tmp_path / "own.yaml").write_text("name: own\nbase_model: {path: acme/tiny}\nstream: coin\n")
    assert load_recipe(tmp_path / "own.yaml", ["data=/d"]).task("GQA").images == "/d"


def test_a_stream_names_the_tasks_of_what_it_extends(recipe_file, tmp_path):
    (tmp_path / "order.yaml").write_text(
        "extends: small.yaml\nname: order\nstream: [b, {name: a, test: 0.3}, {name: c, train: c.json}, b, [a, c]]\n"
    )
    recipe = load_recipe(tmp_path / "order.yaml")
    assert [task.name for task in recipe.tasks] == ["b", "a", "c"]
    assert recipe.task("b") == load_recipe(recipe_file).task("b")
    assert recipe.task("a").test == 0.3 and recipe.task("a").train == str(tmp_path / "a.json")
    assert [stage.tasks for stage in recipe.stages] == [["b"], ["a"], ["c"], ["b"], ["a", "c"]]
    swapped = load_recipe(recipe_file, ["stream=[b, a]"])
    assert [task.name for task in swapped.tasks] == ["b", "a"]


def test_a_task_without_training_data_is_refused(recipe_file):
    assert refusal(recipe_file, ["stream.a.train=null"]) == "command line: stream.a.train: is missing"


def test_a_run_directory_stands_for_its_recipe_and_loads_the_same(recipe_file, tmp_path):
    recipe = load_recipe(recipe_file, ["train.sft.args.learning_rate=2e-4", "seed=3"], ["sefe"])
    write_recipe(recipe, tmp_path / "run" / "recipe.yaml")
    again = load_recipe(tmp_path / "run")
    assert dump_recipe(again) == dump_recipe(recipe)
    assert again.stages == recipe.stages


def test_an_unknown_name_proposes_the_nearest_recipe():
    assert refusal("mini/sequental") == "mini/sequental: no such recipe. Did you mean `mini/sequential`?"
    assert "is a folder without recipe.yaml" in refusal(RECIPES)


# --- Overrides and methods --------------------------------------------------------------------------------------------


def test_overrides_reach_every_place(recipe_file):
    recipe = load_recipe(
        recipe_file,
        [
            "train.sft.args.learning_rate=2e-4",
            "stream.0.style=mcq",
            "stream.b.style=yes_no",
            "stream.b.overrides.lora.r=4",
            "prepare.limit={train: 10}",
            "prepare.limit.test=5",
            "base_model.revision=v1",
        ],
    )
    assert recipe.train.sft.args == {"learning_rate": 2e-4}
    assert (recipe.task("a").style, recipe.task("b").style) == ("mcq", "yes_no")
    assert [stage.train.lora.r for stage in recipe.stages] == [128, 4]
    assert (recipe.prepare.limit.train, recipe.prepare.limit.test) == (10, 5)
    assert recipe.base_model.revision == "v1"


def test_an_override_replaces_where_a_file_merges(recipe_file):
    recipe_file.write_text(SMALL + "train: {sft: {args: {max_steps: 3, learning_rate: 0.1}}}\n")
    assert load_recipe(recipe_file, ["train.sft.args={max_steps: 5}"]).train.sft.args == {"max_steps": 5}


def test_order_of_precedence(recipe_file, tmp_path):
    recipe_file.write_text(SMALL + "train: {lora: {r: 1, alpha: 1, dropout: 0.1}}\n")
    method = tmp_path / "method.yaml"
    method.write_text("method: {asd: {}}\ntrain: {lora: {r: 2, alpha: 2}}\n")
    recipe = load_recipe(recipe_file, ["train.lora.r=3"], [str(method)])
    assert (recipe.train.lora.r, recipe.train.lora.alpha, recipe.train.lora.dropout) == (3, 2, 0.1)


def test_sefe_expands_visibly_and_methods_add_up(recipe_file):
    sefe = {
        "asd": {"fraction": 0.2, "converter": "rules"},
        "reglora": {"key_fraction": 0.02, "weight": 2500, "overlap": "multiset"},
    }
    recipe = load_recipe(recipe_file, with_methods=["sefe"])
    assert recipe.method == sefe
    assert recipe.asd is not None and recipe.asd.fraction == 0.2
    assert load_recipe(recipe_file, with_methods=["asd", "reglora"]).method == sefe
    assert load_recipe(recipe_file, ["method={}"], ["sefe"]).method == {}
    assert load_recipe(recipe_file, ["method.asd.fraction=0.4"], ["sefe"]).asd.fraction == 0.4


def test_methods_that_do_not_fit_are_refused_with_the_file_that_asked(recipe_file, tmp_path):
    line = refusal(recipe_file, ["train.lineage=continue"], ["reglora"])
    assert line.startswith(str(RECIPES / "methods" / "reglora.yaml")) and "works with lineage stack or fold" in line
    assert refusal(recipe_file, with_methods=["seef"]) == "--with seef: no such method. Did you mean `sefe`?"
    assert "Did you mean `reglora`?" in refusal(recipe_file, ["method.regloar={}"])
    assert "cannot be imported" in refusal(recipe_file, with_methods=["no_such_module:Class"])
    assert "method.sefe.reglora: is no settings" in refusal(recipe_file, ["method.sefe.reglora=100"])
    (tmp_path / "broken_method.py").write_text("class Mine(\n")
    assert "cannot be imported: SyntaxError" in refusal(recipe_file, with_methods=["broken_method:Mine"])


# --- Refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("trian.lora.r=3", "command line: trian: unknown key. Did you mean `train`?"),
        ("train.lora.rr=3", "command line: train.lora.rr: unknown key. Did you mean `r`?"),
        ("train.sft.zzz=3", "command line: train.sft.zzz: unknown key. Known here: args, order"),
        ("stream.a.stile=mcq", "command line: stream.a.stile: unknown key. Did you mean `style`?"),
        ("stream.zz.style=mcq", "command line: stream.zz.style: no such entry: zz. Known here: a, b"),
        ("train.lora.r=x", "command line: train.lora.r: Input should be a valid integer, not 'x'"),
        ("train.lora.r='8'", "command line: train.lora.r: Input should be a valid integer, not '8'"),
        *(
            (
                f"train.checkpoint_every={value}",
                "command line: train.checkpoint_every: is neither a number of steps nor a time (90s, 10m, 2h) nor "
                f"`never`, not {shown}",
            )
            for value, shown in (("10x", "'10x'"), ("0", "0"), ("1.5", "1.5"), ("true", "True"), ("0m", "'0m'"))
        ),
        ("train.lora.r=0", "command line: train.lora.r: Input should be greater than 0, not 0"),
        ("seed.x=1", "command line: seed: Input should be a valid integer"),
        ("seed", "command line: seed: is not of the form key=value"),
        ("eval.cells=al", "command line: eval.cells: Input should be 'metrics', 'full', 'seen' or 'last', not 'al'"),
        ("stream=[c]", "command line: stream.0: no earlier task is called c"),
        ("stream=[]", "command line: stream: List should have at least 1 item after validation, not 0"),
        ("stream=[{name: c, train: c}, [c, c]]", "command line: stream.1: c stands twice in one stage"),
        (
            "stream=[{name: c, train: c}, {name: c, train: d}]",
            "command line: stream.1: the task c is defined twice. Write only its name where it re-occurs",
        ),
        ("stream=[{name: c}]", "command line: stream.c.train: is missing"),
        ("stream=[{name: c, trian: d}]", "command line: stream.c.trian: unknown key. Did you mean `train`?"),
        ("x={a: 1, a: 2}", "command line: x:1:8: malformed YAML: the key `a` is given twice"),
        ("train.lora=[1", "command line: train.lora:1:3: malformed YAML: expected ',' or ']', but got '<stream end>'"),
    ],
)
def test_bad_overrides_are_refused_in_one_line(recipe_file, override, line):
    assert refusal(recipe_file, [override]) == line


def test_bad_keys_name_the_file_that_wrote_them(recipe_file, tmp_path):
    (tmp_path / "c.yaml").write_text("extends: small.yaml\nname: c\neval: {cell: full}\n")
    assert refusal(tmp_path / "c.yaml") == f"{tmp_path / 'c.yaml'}: eval.cell: unknown key. Did you mean `cells`?"
    recipe_file.write_text(SMALL + "sed: 1\n")
    (tmp_path / "c.yaml").write_text("extends: small.yaml\nname: c\n")
    assert refusal(tmp_path / "c.yaml") == f"{tmp_path / 'small.yaml'}: sed: unknown key. Did you mean `seed`?"
    recipe_file.write_text(SMALL.replace("name: small\n", ""))
    assert refusal(recipe_file) == f"{recipe_file}: name: is missing"
    recipe_file.write_text("- 1\n")
    assert "is not a mapping of keys" in refusal(recipe_file)
    recipe_file.write_text("")
    assert "is not a mapping of keys" in refusal(recipe_file)


def test_overrides_of_a_task_are_checked_on_loading(recipe_file):
    assert refusal(recipe_file, ["stream.a.overrides.lora.rr=4"]) == (
        "command line: stream.a.overrides: lora.rr: unknown key. Did you mean `r`?"
    )


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["base_model.dtype=float32"], "computes in 16 bits, and base_model.dtype is float32. Set it to bfloat16"),
        (
            ["train.packing=true"],
            "cannot keep samples of a packed row apart. Use flex_attention, or train.packing: false",
        ),
    ],
)
def test_flash_attention_is_refused_on_loading_where_no_machine_computes_it(recipe_file, overrides, line):
    wanted = "train.attention=flash_attention_2"
    load_recipe(recipe_file, [wanted])
    expected = f"command line: train.attention: flash_attention_2 {line}"
    assert refusal(recipe_file, [wanted, *overrides]) == expected


# --- Stages -----------------------------------------------------------------------------------------------------------


def stream(*entries: str) -> Recipe:
    values = parse_yaml(f"name: s\nbase_model: {{path: acme/tiny}}\nstream: [{', '.join(entries)}]", "here")
    return Recipe.model_validate(values)


def test_tasks_re_occur_and_mix():
    recipe = stream("{name: a, train: x}", "[{name: b, train: x}, a]", "a")
    assert [(stage.k, stage.name, stage.folder, stage.tasks) for stage in recipe.stages] == [
        (1, "a", "01-a", ["a"]),
        (2, "b+a", "02-b+a", ["b", "a"]),
        (3, "a", "03-a", ["a"]),
    ]
    assert [task.name for task in recipe.tasks] == ["a", "b"]
    assert recipe.learned == {"a": 1, "b": 2}


def test_a_mixed_stage_takes_the_overrides_of_all_its_tasks():
    recipe = stream(
        "[{name: a, train: x, overrides: {lora: {r: 4}}}, {name: b, train: x, overrides: {lora: {r: 4, alpha: 9}}}]"
    )
    assert (recipe.stages[0].train.lora.r, recipe.stages[0].train.lora.alpha) == (4, 9)
    recipe = stream("[{name: a, train: x, overrides: {lora: {r: 4}}}, {name: b, train: x, overrides: {lora: {r: 5}}}]")
    with pytest.raises(InputError, match=r"stream\.b\.overrides: lora\.r: differs from stream\.a\.overrides"):
        _ = recipe.stages


@pytest.mark.parametrize("seed", range(20))
def test_the_cells_for_the_metrics_are_enough_for_all_of_them(seed):
    """Blanking every cell that `metrics` does not ask for changes no metric."""
    rng = random.Random(seed)
    names = [f"t{i}" for i in range(rng.randint(1, 5))]
    entries = [f"{{name: {name}, train: x}}" for name in names]
    for _ in range(rng.randint(0, 2)):
        entries.append(rng.choice(names))
    recipe = stream(*entries)
    matrix = [[rng.uniform(0, 100) for _ in names] for _ in range(len(entries) + 1)]
    cells = needed_cells("metrics", len(entries), recipe.learned)
    needed = [
        [matrix[k][i] if (k, name) in cells else None for i, name in enumerate(names)] for k in range(len(matrix))
    ]
    learned = list(recipe.learned.values())
    assert continual_metrics(needed, learned, row0=True) == continual_metrics(matrix, learned, row0=True)


@pytest.mark.parametrize(
    ("which", "expected"),
    [
        ("full", [(k, task) for k in range(3) for task in "ab"]),
        ("seen", [(1, "a"), (2, "a"), (2, "b")]),
        ("last", [(2, "a"), (2, "b")]),
        ("metrics", [(0, "a"), (0, "b"), (1, "a"), (1, "b"), (2, "a"), (2, "b")]),
    ],
)
def test_cells_of_the_choices(which, expected):
    assert needed_cells(which, 2, {"a": 1, "b": 2}) == expected


def test_a_preset_lies_under_the_recipes_own_settings(tmp_path: Path) -> None:
    """And is written out, so that loading it again changes nothing."""
    overrides = ["train.paradigm=rft", "train.rft={preset: ctbench, args: {beta: 0.1}, rewards: {accuracy: 1.0}}"]
    recipe = load_recipe("mini/sequential", overrides)
    args = recipe.train.rft.args
    assert (args["beta"], args["num_generations"], args["num_iterations"], args["epsilon"]) == (0.1, 4, 8, 0.15)
    assert recipe.train.rft.rewards == {"accuracy": 1.0}
    write_recipe(recipe, tmp_path / "recipe.yaml")
    assert load_recipe(tmp_path).train == recipe.train


def test_what_changes_no_result_is_no_part_of_a_stage() -> None:
    """An out-of-memory error is met by a smaller micro-batch, and then what is done must stay done."""

    def identity(recipe: str, *args: str) -> Any:
        return load_recipe(recipe, args).train.identity()

    sft, rft = identity("mini/sequential"), identity("mini/rft")
    quiet = ("gradient_checkpointing=true", "dataloader_num_workers=4", "disable_tqdm=true")
    for name, before in (("sft", sft), ("rft", rft)):
        recipe = "mini/sequential" if name == "sft" else "mini/rft"
        assert identity(recipe, *(f"train.{name}.args.{one}" for one in quiet)) == before
        assert identity(recipe, f"train.{name}.args.learning_rate=0.5") != before
    assert identity("mini/sequential", "train.sft.args.per_device_train_batch_size=1", "train.reference=base") == sft
    assert identity("mini/rft", "train.rft.args.per_device_train_batch_size=8") != rft, "a loss may be a mean over it"


def test_where_rollouts_are_made_is_no_part_of_a_stage() -> None:
    here, there, other = (
        load_recipe("mini/rft", [f"train.rft.rollout={{{rollout}}}"]).train.identity()
        for rollout in (
            "engine: server, url: 'http://a/v1', adapters: a",
            "engine: server, url: 'http://b/v1', adapters: b, memory: 0.5",
            "engine: vllm",
        )
    )
    assert here == there != other and "sft" not in here


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.rft.rollout={engine: vllm, adapters: a}", "the engine vllm takes no `adapters`"),
        ("train.rft.rollout.url='http://a/v1'", "the engine transformers takes no `url`"),
        ("train.rft.rewards={beauty: 1.0}", "`beauty` is neither accuracy, format nor module:function"),
        ("train.rft.rif.rolouts=4", "unknown key. Did you mean `rollouts`?"),
    ],
)
def test_rft_settings_that_make_no_sense(override: str, message: str) -> None:
    with pytest.raises(InputError) as error:
        load_recipe("mini/rft", [override])
    assert message in str(error.value)


# --- The page about it ------------------------------------------------------------------------------------------------


def sections(annotation: Any) -> list[type[BaseModel]]:
    """The models that an annotation allows, but not those that a list has many of."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    inner = () if get_origin(annotation) is list else get_args(annotation)
    return [model for part in inner for model in sections(part)]


def keys(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Every key of a section that can be set, with its default as the page writes it."""
    for name, field in model.model_fields.items():
        default = field.get_default(call_default_factory=True)
        if field.is_required():
            text = "**required**" if not sections(field.annotation) else None
        elif isinstance(default, BaseModel):
            text = None
        else:
            text = "–" if default is None else yaml.safe_dump(default, default_flow_style=True, width=1000)
        if text is not None:
            yield f"{prefix}{name}", text.removesuffix("\n").removesuffix("\n...")
        for section in sections(field.annotation):
            yield from keys(section, f"{prefix}{name}.")


def test_the_page_has_every_key_with_its_default() -> None:
    page = (Path(__file__).parents[1] / "docs" / "recipe.md").read_text()
    rows = re.findall(r"^\| `([a-z_.]+)` \| (.+?) \|", page, re.MULTILINE)
    assert len(rows) == len(dict(rows)) and dict(rows) == dict(keys(Recipe))


# --- What a stage's fingerprint holds ---------------------------------------------------------------------------------


def test_the_code_of_own_rewards_and_methods_counts_where_the_converter_is_does_not(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    module = tmp_path / "own_reward.py"
    module.write_text("def good(response, references, sample): return 1.0\n")
    rft = load_recipe("mini/rft", ["train.rft.rewards={accuracy: 0.8, 'own_reward:good': 0.2}"])
    before = inputs._own_code(rft, rft.stages[0])
    assert len(before) == 1 and inputs._own_code(rft, rft.stages[0]) == before
    module.write_text("def good(response, references, sample): return 0.5\n")
    assert inputs._own_code(rft, rft.stages[0]) != before
    sft = load_recipe("mini/sequential", [], ["ewc"])
    assert inputs._own_code(sft, sft.stages[0]) == []

    def methods(endpoint: str, fraction: float = 0.2) -> dict[str, Any]:
        asd = f"method.asd={{converter: llm, model: m, endpoint: '{endpoint}', fraction: {fraction}}}"
        return inputs._methods(load_recipe("mini/sequential", [asd]))

    assert methods("http://a/v1") == methods("http://b/v1") != methods("http://a/v1", 0.4)
