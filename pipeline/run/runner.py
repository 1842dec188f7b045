"""The sequence runner: prepare, tune stage after stage, evaluate, report; again, and it does only what is left."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mcit.data_prep.errors import InputError, not_written
from mcit.data_prep.files import read_json, write_json
from mcit.data_prep.hub import is_pinned, pin, same_dataset
from mcit.data_prep.places import PATHS
from mcit.data_prep.prepare import read_task
from mcit.data_prep.readers import is_function, source_files
from mcit.eval.config import JudgeConfig
from mcit.eval.hashing import hub_commit
from mcit.eval.judge.judges import judge_identity
from mcit.eval.report.words import old_task_verdicts
from mcit.eval.results import read_results

from ..recipe.layers import nearest, read_layer
from ..recipe.loading import dump_recipe, write_recipe
from ..recipe.schema import ModelConfig, Recipe, Stage
from ..recipe.tasks import tasks_of
from ..training.arguments import check_mode, split_batch
from .doctor import environment
from .start import pin_start
from .status import write_status
from .step import Launch, Step
from .steps import Run
from .terminal import Terminal

if TYPE_CHECKING:
    from ..methods import Method


def start_run(recipe: Recipe, run_dir: Path, launch: Launch, terminal: Terminal) -> Run:
    """Make or take up the directory of a run. Raises `InputError`."""
    take_up(recipe, run_dir, launch, terminal)
    return Run(recipe, run_dir.resolve(), launch)


def take_up(recipe: Recipe, run_dir: Path, launch: Launch, terminal: Terminal) -> None:
    """Settle a recipe and write it. Raises `InputError`."""
    before = settle(recipe, run_dir, launch)
    if before and before.get("name") != recipe.name:
        terminal.say(
            f"{run_dir} was made by the recipe {before.get('name')}: what fits {recipe.name} is kept", "yellow"
        )
    if before != dump_recipe(recipe):
        write_recipe(recipe, run_dir.resolve() / "recipe.yaml")


def settle(recipe: Recipe, run_dir: Path, launch: Launch) -> dict[str, Any] | None:
    """Check what can be checked, and pin in `recipe` what comes from the Hub; writes nothing.

    Returns the recipe that the directory holds so far. Raises `InputError`, also where a run and a sweep would mix.
    """
    if run_dir.exists() and not run_dir.is_dir():
        raise InputError("is a file", where=run_dir, field="--run-dir", remedy="Name a folder")
    before = _recipe_before(run_dir)
    if before and bool(before.get("sweep")) != bool(recipe.sweep):
        kinds = ("a sweep", "a run of its own") if recipe.sweep is None else ("a run of its own", "a sweep")
        raise InputError(f"holds {kinds[0]}, and this is {kinds[1]}", where=run_dir, remedy="Set another --run-dir")
    check_recipe(recipe, launch)
    recipe.base_model = _pinned(recipe.base_model, run_dir)
    _pin_data(recipe, run_dir)
    if recipe.start_from is not None:
        recipe.start_from = pin_start(recipe.start_from, (before or {}).get("start_from"))
    return before


def check_recipe(recipe: Recipe, launch: Launch) -> None:
    """Refuse what can be seen without reading data or loading a model. Raises `InputError`."""
    _check_files(recipe)
    _check_batches(recipe, launch)
    for stage in recipe.stages:
        check_mode(recipe, stage, _methods(recipe, stage), launch.mode)
    _check_judge(recipe)


def perform_steps(run: Run, steps: Iterable[Step], terminal: Terminal) -> None:
    """Do `steps` in order, each unless it is done. Raises `InputError` and `ChildFailed`; what was done stays done."""
    for step in steps:
        if changed := step.changed():
            following = " and what follows" if step.name.startswith("train/") else ""
            terminal.say(f"{step.title}{following}: again, because this changed: {', '.join(changed[:5])}", "yellow")
        try:
            with terminal.working(step.title) as show:
                marker, did = run.perform(step, show)
        except KeyboardInterrupt:
            kept = "what is done is kept, the same command goes on from here"
            terminal.say(f"{step.title}: interrupted; {kept}", "yellow")
            raise
        except OSError as error:
            raise not_written(error, run.dir) from None
        terminal.finished(step.title, marker["seconds"] if did else None, *(_details(step, marker) if did else ()))
        if did:
            _write_environment(run, step)
            write_status(run)


def _write_environment(run: Run, step: Step) -> None:
    """What the run was done on, by which launch: the last one that trained, or the first of all."""
    path, launch = run.dir / "environment.json", str(run.launch.config)
    if path.exists() and not step.name.startswith("train/"):
        launch = read_json(path).get("launch", launch)
    write_json(path, environment() | {"launch": launch})


def train_stage(run: Run, k: int, terminal: Terminal) -> None:
    """Prepare what stage `k` needs and train it. Raises `InputError` if the stage before is not done.

    On several nodes, node 0 does this, and the others start their share of the training.
    """
    stages = run.training()
    if not 1 <= k <= len(stages):
        raise InputError(f"the stream has stages 1 to {len(stages)}", where=run.recipe.name, field="--stage")
    if run.launch.rank:
        with terminal.working(f"node {run.launch.rank}") as show:
            run.assist(run.recipe.stages[k - 1], show)
        return
    perform_steps(run, run.preparation(), terminal)
    if k > 1 and not stages[k - 2].done():
        raise InputError(f"stage {k - 1} is not done", where=run.dir, remedy=f"Train it first: --stage {k - 1}")
    perform_steps(run, [stages[k - 1]], terminal)


def evaluate_stage(run: Run, k: int, terminal: Terminal) -> None:
    """Evaluate stage `k` alone, beside whatever else the run does. Raises `InputError` if it is not trained."""
    if k not in run.rows():
        problem, remedy = f"{run.recipe.eval.cells} has no cell of stage {k}", f"It has cells of {run.rows()}"
        raise InputError(problem, where=run.recipe.name, field="eval.cells", remedy=remedy)
    step = run.evaluate(row=k)
    if step.inputs() is None:
        before = f"mcit train {run.dir} --stage {k}" if k else f"mcit prepare {run.dir}"
        raise InputError(f"stage {k} is not done", where=run.dir, remedy=f"First: `{before}`")
    perform_steps(run, [step], terminal)


def judge_run(run: Run, terminal: Terminal) -> None:
    """Score the reasoning in what has been answered so far. Raises `InputError` without a judge, or answers."""
    if run.recipe.eval.judge is None:
        remedy = "Name one: eval.judge=module:function, or eval.judge.endpoint=http://… eval.judge.model=NAME"
        raise InputError("names no judge", where=run.recipe.name, field="eval.judge", remedy=remedy)
    steps = [run.judge(partly=True), *run.reporting()]
    if steps[0].inputs() is None:
        raise InputError("has no answers to judge yet", where=run.dir, remedy=f"First: `mcit eval {run.dir}`")
    perform_steps(run, steps, terminal)


def show_results(run: Run, terminal: Terminal) -> None:
    """The readable matrix, the metrics, what the wrong answers on old tasks are, and where the page is."""
    results = read_results(run.dir)
    terminal.results(results, old_task_verdicts(dict(results)))
    terminal.say(f"report: {run.dir / 'report' / 'index.html'}")


def _check_files(recipe: Recipe) -> None:
    """Refuse missing data files before anything is written; what is on the Hub is looked for when it is fetched."""
    for task in recipe.sources:
        section = "stream" if task in recipe.tasks else "anchors" if task in recipe.anchors else "eval.general"
        for key in PATHS:
            source, field = getattr(task, key), f"{section}.{task.name}.{key}"
            if task.data is not None or not isinstance(source, str) or is_function(source):
                continue
            if not Path(source).is_absolute():
                remedy = "Give the folder of the downloaded data: data=FOLDER (docs/data.md says what is in it)"
                problem = f"is not set, and {field} ({source}) is in it"
                raise InputError(problem, where=recipe.name, field="data", remedy=remedy)
            if key == "images" and not source.endswith(".zip"):
                if not Path(source).is_dir():
                    raise InputError("no such folder", where=source, field=field)
            elif not all(path.is_file() for path in source_files(source, Path())):
                raise InputError("no such file", where=source, field=field)


def _check_batches(recipe: Recipe, launch: Launch) -> None:
    """Refuse a global batch that does not divide by this launch's processes, whichever stage has it."""
    for stage in recipe.stages:
        for phase in stage.train.phases:
            per_device = stage.train.args(phase).get("per_device_train_batch_size")
            if per_device or launch.processes > 1:
                split_batch(stage.train.batch_size(phase), launch.processes, per_device)


def _methods(recipe: Recipe, stage: Stage) -> list["Method"]:
    if not recipe.method:
        return []
    from ..methods import build_methods  # here: needs torch

    return build_methods(recipe.method, stage.train)


def _check_judge(recipe: Recipe) -> None:
    """Refuse a program that cannot be imported, and rubrics of tasks that the stream does not have."""
    judge = recipe.eval.judge
    if judge is None:
        return
    try:
        judge_identity(judge)
    except InputError as error:
        raise InputError(str(error), where=recipe.name, field="eval.judge") from None
    names = [task.name for task in recipe.tasks]
    for name in judge.rubrics if isinstance(judge, JudgeConfig) else ():
        if name not in names:
            field = f"eval.judge.rubrics.{name}"
            raise InputError("no task is called so", where=recipe.name, field=field, remedy=nearest(name, names))


def _pinned(model: ModelConfig, run_dir: Path) -> ModelConfig:
    """A Hub id with the commit it stands for, so that every stage loads the same; a folder as it is."""
    if Path(model.path).is_dir():
        return model
    before = (_recipe_before(run_dir) or {}).get("base_model", {})
    if before.get("path") == model.path and model.revision is None:
        return model.model_copy(update={"revision": before.get("revision")})
    return model.model_copy(update={"revision": hub_commit(model.path, model.revision)})


def _pin_data(recipe: Recipe, run_dir: Path) -> None:
    """Name the commit of every dataset on the Hub, so that a run keeps to the data that it began with."""
    recipe_before = _recipe_before(run_dir) or {}
    general = (recipe_before.get("eval") or {}).get("general")
    tasks_before = [*tasks_of(recipe_before.get("stream")), *tasks_of(recipe_before.get("anchors")), *tasks_of(general)]
    before = {task.get("name"): task.get("data") for task in tasks_before}
    pinned: dict[str, str] = {}
    for task in recipe.sources:
        if task.data is None:
            continue
        earlier = before.get(task.name)
        if earlier and not is_pinned(task.data) and same_dataset(earlier, task.data):
            task.data = earlier
        else:
            if task.data not in pinned:
                pinned[task.data] = pin(task.data)
            task.data = pinned[task.data]


def _recipe_before(run_dir: Path) -> dict[str, Any] | None:
    path = run_dir / "recipe.yaml"
    return read_layer(path) if path.exists() else None


def _details(step: Step, marker: dict[str, Any]) -> list[str]:
    """What is worth saying of a step that was done."""
    if step.name.startswith("prepare/"):
        task = read_task(marker["folder"])
        counts = ", ".join(f"{count} {part}" for part, count in task["counts"].items() if count)
        return [f"{counts}; {task['style']}, scored by {task['scorer']}", *task["notes"]]
    if step.name.startswith("train/"):
        trained, during = marker["trained"], marker["trained"].get("during")
        asked = f", {during['seconds']:.1f} s of it for {during['evaluations']} evaluations" if during else ""
        return [f"{trained['steps']} steps, {trained['samples']} samples, {trained['mode']}{asked}", *trained["notes"]]
    if step.name == "check" and marker["notes"]:
        return ["", *marker["notes"]]
    if step.name == "publish":
        return [marker["address"], *marker["notes"]]
    if step.name == "judge":
        counts = ", ".join(f"{count} {outcome}" for outcome, count in marker["outcomes"].items() if count)
        return [f"{marker['cells']} cells: {counts or 'no task asks for reasoning'}"]
    if step.name.startswith("evaluate"):
        return [f"{marker['answered']} cells, {' and '.join(marker['engines'])}", *marker["notes"]]
    return []
