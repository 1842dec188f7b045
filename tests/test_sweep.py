"""Sweeps: which runs they are, that they share and continue, and what they agree on."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from mcit.data_prep.errors import InputError
from mcit.data_prep.files import read_json, write_json
from mcit.eval.metrics import continual_metrics
from mcit.eval.report.sweep import write_sweep_report
from mcit.eval.report.words import METRICS, shown
from mcit.eval.results import read_results
from mcit.eval.stats import mean_interval
from mcit.eval.sweep import assemble_sweep, is_sweep, read_sweep
from mcit.pipeline import cli
from mcit.pipeline.recipe.layers import RECIPES
from mcit.pipeline.recipe.loading import dump_recipe, load_recipe, write_recipe
from mcit.pipeline.recipe.orders import members
from mcit.pipeline.run.runner import perform_steps, start_run
from mcit.pipeline.run.step import Launch
from mcit.pipeline.run.sweep import run_sweep, start_sweep, sweep_status
from mcit.pipeline.run.terminal import Terminal
from mcit.pipeline.verbs.reports import report

SMALL = """
name: small
base_model: {path: acme/tiny}
stream:
  - {name: a, train: a.json}
  - {name: b, train: b.json, test: 0.2}
  - {name: c, train: c.json}
"""


@pytest.fixture
def small(tmp_path: Path) -> Path:
    (tmp_path / "small.yaml").write_text(SMALL)
    (tmp_path / "back.yaml").write_text("extends: small.yaml\nname: small-back\nstream: [c, {name: b, test: 0.5}, a]\n")
    (tmp_path / "mixed.yaml").write_text("extends: small.yaml\nname: small-mixed\nstream: [[a, b], c, a]\n")
    return tmp_path / "small.yaml"


def quiet() -> Terminal:
    return Terminal(Console(record=True, file=open(os.devnull, "w"), width=200))


# --- Which runs -------------------------------------------------------------------------------------------------------


def test_every_order_under_every_seed(small):
    recipe = load_recipe(small, ["sweep={seed: [3, 5], order: [small, back, mixed]}"])
    runs = {member.name: member for member in members(recipe)}
    orders = ("small", "back", "mixed")
    assert list(runs) == [f"{order}-seed-{seed}" for order in orders for seed in (3, 5)]
    names = {order: [stage.name for stage in runs[f"{order}-seed-3"].recipe.stages] for order in orders}
    assert names == {"small": ["a", "b", "c"], "back": ["c", "b", "a"], "mixed": ["a+b", "c", "a"]}
    for member in runs.values():
        assert member.recipe.seed == member.seed and member.recipe.sweep is None
        assert member.recipe.name == f"small-{member.name}"
        assert {task.name: task for task in member.recipe.tasks} == {task.name: task for task in recipe.tasks}


def test_seeds_alone_and_orders_alone(small):
    assert [member.name for member in members(load_recipe(small, ["sweep.seed=[0, 1]"]))] == ["seed-0", "seed-1"]
    recipe = load_recipe(small, ["sweep={order: [back]}", "seed=7"])
    assert [(member.name, member.recipe.seed) for member in members(recipe)] == [("back-seed-7", 7)]


def test_a_written_sweep_needs_its_order_files_no_more(small, tmp_path):
    recipe = load_recipe(small, ["sweep={seed: [0], order: [back, mixed]}"])
    assert recipe.sweep.order == {"back": ["c", "b", "a"], "mixed": [["a", "b"], "c", "a"]}
    write_recipe(recipe, tmp_path / "run" / "recipe.yaml")
    (tmp_path / "back.yaml").unlink()
    again = load_recipe(tmp_path / "run")
    assert dump_recipe(again) == dump_recipe(recipe) and list(members(again)) == list(members(recipe))


def test_published_orders_are_orders():
    """ctbench's order files (code), as the recipes beside them have them."""
    names = ["stream", "order_b", "order3", "order5", "order6"]
    recipe = load_recipe("ctbench/stream", [f"sweep={{order: [{', '.join(names)}]}}", "data=/data/ctbench"])
    for member, name in zip(members(recipe), names, strict=True):
        published = load_recipe(f"ctbench/{name}", ["data=/data/ctbench"])
        assert member.recipe.stages == published.stages and member.recipe.tasks == published.tasks
    elsewhere = load_recipe("ctbench/rft", ["sweep={order: [ctbench/order_b]}", "data=/data/ctbench"])
    assert [member.name for member in members(elsewhere)] == ["order_b-seed-0"]


@pytest.mark.parametrize(
    ("sweep", "line"),
    [
        ("{seed: [1, 1]}", "sweep.seed: names a seed twice"),
        ("{seed: [x]}", r"sweep\.seed\.0: Input should be a valid integer, not 'x'"),
        ("{seeds: [1]}", r"sweep\.seeds: unknown key\. Did you mean `seed`\?"),
        ("{order: [bakc]}", "bakc: no such recipe"),
        (
            "{order: [[c, b, a]]}",
            r"sweep\.order: \['c', 'b', 'a'\] is no recipe\. Or give .* \{name: \[task, task, …\]\}",
        ),
        ("{order: [back, back]}", r"sweep\.order: back is named twice"),
        ("{order: {x: [a, b]}}", r"sweep\.order\.x: leaves out c"),
        ("{order: {x: [a, b, c, d]}}", r"sweep\.order\.x: no task is called d"),
    ],
)
def test_mistakes_are_one_clear_line(small, sweep, line):
    with pytest.raises(InputError, match=line) as caught:
        load_recipe(small, [f"sweep={sweep}"])
    assert "\n" not in str(caught.value)


def test_an_order_without_a_list_of_tasks(small, tmp_path):
    (tmp_path / "named.yaml").write_text("name: named\nstream: mini\n")
    with pytest.raises(InputError, match=r"named\.yaml: stream: lists no tasks\. An order is a recipe with"):
        load_recipe(small, ["sweep={order: [named]}"])


# --- What they agree on -----------------------------------------------------------------------------------------------


def results(seed: int, *, tasks: tuple[str, str] = ("a", "b"), hole: bool = False) -> dict:
    matrix = [[10.0, 20.0], [80.0 + seed, None if hole else 30.0], [50.0 + 3 * seed, 90.0]]
    stages = [{"k": 0, "name": "base", "tasks": []}]
    stages += [{"k": k, "name": task, "tasks": [task]} for k, task in enumerate(tasks, 1)]
    return {
        "schema_version": 1,
        "name": f"r-{seed}",
        "seed": seed,
        "method": {},
        "matrix": matrix,
        "row0": True,
        "stages": stages,
        "learned": {task: k for k, task in enumerate(tasks, 1)},
        "tasks": [{"name": task, "style": "short", "scorer": "short", "n": 4} for task in tasks],
        "metrics": continual_metrics(matrix, [1, 2], row0=True),
        **dict.fromkeys(("stderr", "n", "verdicts", "hashes", "versions", "seconds")),
    }


def test_means_and_intervals_of_metrics_and_cells():
    found = assemble_sweep("s", [(f"seed-{seed}", None, results(seed, hole=seed == 2)) for seed in (0, 1, 2)])
    assert [run["seed"] for run in found["runs"]] == [0, 1, 2]
    assert found["metrics"]["MFN"] == mean_interval([70.0, 71.5, 73.0])
    assert found["metrics"]["BWT"] == mean_interval([-30.0, -28.0, -26.0])
    assert found["metrics"]["FWT"] == mean_interval([10.0, 10.0]), "not defined in the third run"
    [matrix] = found["matrices"]
    assert matrix["cells"][1][0] == mean_interval([80.0, 81.0, 82.0]) and matrix["cells"][1][1]["n"] == 2
    assert assemble_sweep("s", [("seed-0", None, results(0, hole=True))])["matrices"][0]["cells"][1][1] is None


def test_the_matrix_is_averaged_by_order_and_metrics_over_all():
    runs = [(f"seed-{seed}", order, results(seed)) for seed in (0, 1) for order in ("x", "y")]
    found = assemble_sweep("s", runs)
    assert [matrix["order"] for matrix in found["matrices"]] == ["x", "y"]
    assert [matrix["cells"][2][0]["n"] for matrix in found["matrices"]] == [2, 2]
    assert found["metrics"]["MFN"]["n"] == 4
    drawn = [("seed-0", None, results(0)), ("seed-1", None, results(1, tasks=("b", "a")))]
    assert len(assemble_sweep("s", drawn)["matrices"]) == 2, "the stages depend on the seed: `recur`"


def test_an_interval_as_it_is_shown():
    assert shown(mean_interval([1.0, 3.0])) == "2.0 ± 12.7" and shown(mean_interval([5.0])) == "5.0"
    assert shown(None) == "–"


def test_a_page_of_sweeps_and_runs(tmp_path):
    sweep = assemble_sweep("<b>sweep", [(f"seed-{seed}", "x", results(seed)) for seed in (0, 1)])
    write_json(tmp_path / "sweep" / "results.json", sweep)
    write_json(tmp_path / "run" / "results.json", results(5))
    assert is_sweep(tmp_path / "sweep") and not is_sweep(tmp_path / "run") and not is_sweep(tmp_path)
    page = write_sweep_report([tmp_path / "sweep", tmp_path / "run"], tmp_path / "page").read_text()
    assert "&lt;b&gt;sweep" in page and "<b>sweep" not in page
    assert f"<td>{shown(sweep['metrics']['MFN'])}</td><td>77.5</td>" in page
    assert '<td class="text"><small></small>' not in page, "a metric without a meaning"
    assert page.count('class="learned"') == 4 and (tmp_path / "page" / "matrix.png").stat().st_size > 5000
    with pytest.raises(InputError, match="no results yet"):
        read_sweep(tmp_path)


@pytest.mark.system
@pytest.mark.skipif(not shutil.which("chromium"), reason="needs Debian's chromium; .ci/run installs it")
def test_the_page_of_sweeps_is_no_wider_than_a_phone(tmp_path):
    """Tables scroll by themselves; the page that holds them does not."""
    runs = [(f"seed-{seed}", "x", results(seed)) for seed in (0, 1)]
    for _, _, result in runs:
        result["metrics"] = dict.fromkeys(METRICS, 55.0)
    write_json(tmp_path / "sweep" / "results.json", assemble_sweep("a-sweep-of-two-runs", runs))
    page = write_sweep_report([tmp_path / "sweep"], tmp_path / "page")
    with page.open("a") as file:
        file.write("<script>document.title = `${document.documentElement.scrollWidth} of ${innerWidth}`</script>")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    flags += ["--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path / 'chromium'}"]
    command = ["chromium", *flags, "--window-size=500,900", "--virtual-time-budget=2000", "--dump-dom", page.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    found = re.search(r"<title>(\d+) of (\d+)</title>", dom)
    assert found and int(found[1]) <= int(found[2])


def test_sweeps_against_each_other_are_paired_by_seed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, gain in (("one", 0), ("two", 10)):
        runs = [(f"seed-{seed}", None, results(seed)) for seed in (0, 1, 2)]
        for _, _, result in runs:
            result["metrics"] = {"MFN": result["metrics"]["MFN"] + gain, "FWT": None}
        write_json(Path(name) / "results.json", assemble_sweep(name, runs))
    terminal = quiet()
    report([Path("one"), Path("two")], None, terminal)
    assert read_json(Path("report") / "comparison.json")["others"]["two"] == {
        "MFN": {"mean": 10.0, "low": 10.0, "high": 10.0, "n": 3}
    }
    said = terminal.console.export_text()
    assert "paired by seed and order" in said and "+10.0 [+10.0, +10.0]" in said


# --- A whole sweep ----------------------------------------------------------------------------------------------------

RECIPE = f"""
name: one
base_model: {{path: {RECIPES / "mini" / "tiny_vlm"}, dtype: float32}}
stream:
  - {{name: only, train: only.json, test: 0.25, style: short}}
train: {{lora: {{r: 2, alpha: 4, dropout: 0}}, global_batch_size: 2, sft: {{args: {{max_steps: 1}}}}}}
eval: {{engine: transformers, max_new_tokens: 4, during: {{dense: 1, probes: 2}}}}
sweep: {{seed: [0, 1]}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A recipe with one task, in a folder with a cache of its own."""
    folder, before, rows = tmp_path_factory.mktemp("sweep"), dict(os.environ), []
    for i, colour in enumerate(["red", "green", "blue", "white"] * 2):
        Image.new("RGB", (28, 28 + i), colour).save(folder / f"{i}.png")
        turns = [{"from": "human", "value": "<image>\nWhich colour is it?"}, {"from": "gpt", "value": colour}]
        rows.append({"id": str(i), "image": f"{i}.png", "conversations": turns})
    (folder / "only.json").write_text(json.dumps(rows))
    (folder / "one.yaml").write_text(RECIPE)
    os.environ |= {"MCIT_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    yield folder
    os.environ.clear()
    os.environ.update(before)


def test_a_sweep_shares_continues_and_agrees(folder, monkeypatch, capsys):
    terminal, launch, root = quiet(), Launch.named("single"), folder / "runs"
    sweep = start_sweep(load_recipe(folder / "one.yaml"), root, launch, terminal)
    first, second = (sweep.run(member) for member in sweep.members)
    perform_steps(first, first.steps(), terminal)  # as if it had been stopped there
    assert sweep_status(sweep)["state"] == "left" and not (root / "results.json").exists()
    trained = (first.dir / "stages" / "01-only" / "done.json").stat().st_mtime_ns

    run_sweep(start_sweep(load_recipe(root), root, launch, terminal), terminal)
    assert (first.dir / "stages" / "01-only" / "done.json").stat().st_mtime_ns == trained
    assert len(list((folder / "cache" / "predictions").iterdir())) == 3, "row 0 was asked once"
    assert (first.dir / "data" / "only").resolve() == (second.dir / "data" / "only").resolve()
    one, two = read_results(first.dir), read_results(second.dir)
    assert one["hashes"]["policies"][1] != two["hashes"]["policies"][1] and one["matrix"][0] == two["matrix"][0]
    assert one["curves"]["tasks"]["only"]["steps"] == [0, 1] and one["metrics"]["min_ACC"] is None

    found = read_sweep(root)
    assert found["metrics"]["MFN"] == mean_interval([one["metrics"]["MFN"], two["metrics"]["MFN"]])
    assert [run["name"] for run in found["runs"]] == ["seed-0", "seed-1"]
    assert (root / "report" / "index.html").exists() and (first.dir / "report" / "stability.png").exists()
    assert read_json(root / "status.json")["state"] == "done"

    def mcit(*arguments: object) -> str:
        monkeypatch.setattr("sys.argv", ["mcit", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert not end.value.code
        return capsys.readouterr().out

    assert json.loads(mcit("metrics", root)) == found["metrics"]
    assert json.loads(mcit("metrics", root / "seed-0")) == one["metrics"]
    assert json.loads(mcit("status", root, "--json"))["runs"].keys() == {"seed-0", "seed-1"}
    assert "done    seed-1  " in mcit("status", root)
    assert "mean over (runs)" in mcit("report", root)
    assert "paired by sample" in mcit("report", root / "seed-0", root / "seed-1", "--out", folder / "both")
    compared = read_json(folder / "both" / "comparison.json")["others"][str(root / "seed-1")]
    assert compared["MFN"]["difference"] == pytest.approx(two["metrics"]["MFN"] - one["metrics"]["MFN"])

    written = root / "results.json"
    before = written.stat().st_mtime_ns
    said = mcit("run", root)
    assert "seed-1, 2 of 2" in said and "✓" not in said and "mean over (runs)" in said
    assert written.stat().st_mtime_ns == before, "a finished sweep has nothing to do"


def test_a_run_and_a_sweep_do_not_share_a_folder(folder):
    recipe, launch = load_recipe(folder / "one.yaml"), Launch.named("single")
    start_sweep(recipe, folder / "s", launch, quiet())
    single = load_recipe(folder / "one.yaml", ["sweep=null"])
    with pytest.raises(InputError, match=r"holds a sweep, and this is a run of its own\. Set another --run-dir"):
        start_run(single, folder / "s", launch, quiet())
    start_run(single, folder / "r", launch, quiet())
    with pytest.raises(InputError, match="holds a run of its own, and this is a sweep"):
        start_sweep(recipe, folder / "r", launch, quiet())


def test_one_step_of_a_sweep_is_refused(folder, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["mcit", "train", str(folder / "one.yaml"), "--stage", "1"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    err = capsys.readouterr().err
    assert end.value.code == 2 and err.count("\n") == 1
    assert "sweep: is a sweep of 2 runs. Name the folder of one (runs/one/seed-0), or add sweep=null" in err
