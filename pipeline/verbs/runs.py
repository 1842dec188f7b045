"""The verbs of `mcit` that make runs, look at them and ask them."""

import os
import re
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from mcit.data_prep.errors import InputError

from .options import AsJson, Gpus, LaunchOption, Overrides, RecipeArgument, RunDir, With, print_json


def run(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    with_method: With = None,
    run_dir: RunDir = None,
    launch: LaunchOption = "single",
    gpus: Gpus = None,
    evaluate_on: Annotated[
        str | None,
        typer.Option(
            metavar="GPUS",
            help="Evaluate each stage while the next ones train, on these GPUs, which training leaves free: `3`, "
            "`2,3`; `cpu` on a machine without any.",
        ),
    ] = None,
    print_config: Annotated[
        bool, typer.Option(help="Print what the recipe and each stage resolve to; do nothing.")
    ] = False,
) -> None:
    """Do everything: prepare, tune each stage, evaluate, report. Again: it continues, and redoes nothing unchanged.

    A recipe with a `sweep` is run under each of its seeds and orders, `sweep={seed: [0, 1, 2]}`.

    Example: `mcit run mini/sequential --with sefe seed=1 --run-dir runs/sefe-1`
    """
    from ..run.beside import perform_run
    from ..run.runner import show_results, start_run
    from ..run.terminal import Terminal

    if print_config:
        print(_configuration(recipe, overrides, with_method), end="")
        return
    terminal = Terminal()
    loaded, directory, launcher = found(recipe, overrides, with_method, run_dir, launch, gpus)
    if loaded.sweep:
        from ..run.sweep import run_sweep, start_sweep
        from .reports import report as show_report

        run_sweep(start_sweep(loaded, directory, launcher, terminal), terminal, evaluate_on)
        show_report([directory], None, terminal)
        return
    current = start_run(loaded, directory, launcher, terminal)
    perform_run(current, terminal, evaluate_on)
    show_results(current, terminal)


def prepare(
    recipe: RecipeArgument, overrides: Overrides = None, with_method: With = None, run_dir: RunDir = None
) -> None:
    """Prepare and check the data of all tasks.

    Example: `mcit prepare mini/sefe`
    """
    from ..run.runner import perform_steps
    from ..run.terminal import Terminal

    terminal = Terminal()
    current = start(recipe, overrides, with_method, run_dir, "single", None, terminal)
    perform_steps(current, current.preparation(), terminal)
    terminal.say(f"prepared; `mcit show {current.dir}` says what the model will see, `mcit run {current.dir}` goes on")


def train(
    recipe: RecipeArgument,
    stage: Annotated[int, typer.Option(help="1 is the first.")],
    overrides: Overrides = None,
    with_method: With = None,
    run_dir: RunDir = None,
    launch: LaunchOption = "single",
    gpus: Gpus = None,
    nodes: Annotated[int, typer.Option(min=1, help="Nodes of a SLURM job on which `srun` starts this command.")] = 1,
) -> None:
    """Train one stage; the stage before must be done.

    Example: `mcit train mini/sefe --stage 2`
    """
    from ..run.runner import train_stage
    from ..run.terminal import Terminal

    terminal = Terminal()
    train_stage(start(recipe, overrides, with_method, run_dir, launch, gpus, terminal, nodes), stage, terminal)


def evaluate(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    run_dir: RunDir = None,
    stage: Annotated[int | None, typer.Option(help="Evaluate this one alone (0: the base), and no more.")] = None,
    follow: Annotated[
        bool, typer.Option("--follow", help="Wait for stages that another process trains, until all are evaluated.")
    ] = False,
) -> None:
    """Evaluate the stages that are done, in the cells that `eval.cells` asks for, and print the matrix.

    Example: `mcit eval runs/mini-sefe eval.engine=transformers`
    """
    from ..run.beside import follow as follow_run
    from ..run.runner import evaluate_stage, perform_steps, show_results
    from ..run.terminal import Terminal

    terminal = Terminal()
    current = start(recipe, overrides, None, run_dir, "single", None, terminal)
    if stage is not None and follow:
        raise InputError("follows all stages", where="--follow", remedy="Leave --stage out")
    if stage is not None:
        evaluate_stage(current, stage, terminal)
        return
    if follow:
        follow_run(current, terminal)
    perform_steps(
        current, [current.evaluate(partly=True), *current.judging(partly=True), *current.reporting()], terminal
    )
    show_results(current, terminal)


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="One run, or several to set side by side.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder to write to. Default: RUN/report; of several, report/ beside the first.")
    ] = None,
) -> None:
    """Write the report page of a run or a sweep, or of several side by side, each compared with the first.

    Example: `mcit report runs/mini-sequential runs/mini-sefe --out runs/comparison`
    """
    from ..run.terminal import Terminal
    from .reports import report as show_report

    show_report(runs, out, Terminal())


def ask(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")],
    question: Annotated[str, typer.Argument(help="As the model is to read it, format sentence and options included.")],
    image: Annotated[list[Path] | None, typer.Option(help="An image; several if repeated.")] = None,
    stage: Annotated[list[int] | None, typer.Option(help="0 is the base; several if repeated. Default: all.")] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Recipe keys to change: eval.engine=vllm.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Ask the policies of several stages one question, side by side.

    Example: `mcit ask runs/mini-sefe "Is there a red circle? Answer yes or no." --image x.png --stage 0 --stage 5`
    """
    from rich.console import Console

    from mcit.eval.ask import ask as ask_policies
    from mcit.eval.ask import read_policies

    from ..recipe.loading import load_recipe
    from ..run.terminal import Terminal

    # What libraries remark while an engine starts goes into a log elsewhere; here it would bury the answer.
    warnings.filterwarnings("ignore")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    policies = read_policies(run, stage or ())
    config = load_recipe(run, overrides or (), check_methods=False).eval
    terminal = Terminal(Console(stderr=True, highlight=False, soft_wrap=True) if as_json else None)
    with terminal.working("ask") as show:
        answers = ask_policies(policies, question, image or (), config, show)
    if as_json:
        print_json([answer._asdict() for answer in answers])
        return
    rows = [
        (
            f"{a.stage} {a.name}",
            a.answer if a.finished else f"{a.answer} … (cut off)",
            "" if a.probability is None else f"{a.probability:.2f}",
        )
        for a in answers
    ]
    terminal.table(question, ("policy of stage", "answer", "its probability"), rows)


def found(
    recipe: str,
    overrides: list[str] | None,
    with_method: list[str] | None,
    run_dir: Path | None,
    launch: str,
    gpus: int | None,
    nodes: int = 1,
) -> tuple[Any, Path, Any]:
    """The recipe, directory and launch that the arguments mean: a run directory is taken up where it is."""
    from ..recipe.loading import load_recipe
    from ..run.step import Launch

    loaded = load_recipe(recipe, overrides or (), with_method or ())
    added = (re.sub(r"\W+", "-", Path(method).name.removesuffix(".yaml")) for method in with_method or ())
    own = Path("runs") / "-".join([loaded.name, *added])
    directory = run_dir or (Path(recipe) if Path(recipe).is_dir() else own)
    return loaded, directory, Launch.named(launch, gpus, nodes)


def start(
    recipe: str,
    overrides: list[str] | None,
    with_method: list[str] | None,
    run_dir: Path | None,
    launch: str,
    gpus: int | None,
    terminal: Any,
    nodes: int = 1,
) -> Any:
    """The run that the arguments mean, for commands that do one step of it. Raises `InputError` for a sweep."""
    from ..recipe.orders import members
    from ..run.runner import start_run

    loaded, directory, launcher = found(recipe, overrides, with_method, run_dir, launch, gpus, nodes)
    if loaded.sweep:
        first, *others = members(loaded)
        remedy = f"Name the folder of one ({directory / first.name}), or add sweep=null; `mcit run` runs all"
        raise InputError(f"is a sweep of {len(others) + 1} runs", where=recipe, field="sweep", remedy=remedy)
    return start_run(loaded, directory, launcher, terminal)


def _configuration(recipe: str, overrides: list[str] | None, with_method: list[str] | None) -> str:
    """The resolved recipe, and as a second YAML document what each stage resolves to."""
    from ..recipe.loading import dump_recipe, load_recipe
    from ..recipe.text import to_yaml

    loaded = load_recipe(recipe, overrides or (), with_method or ())
    stages = [
        {"stage": stage.k, "name": stage.name, "tasks": stage.tasks, "train": stage.train.model_dump(mode="json")}
        for stage in loaded.stages
    ]
    return f"# The recipe\n{to_yaml(dump_recipe(loaded))}---\n# What each stage resolves to\n{to_yaml(stages)}"
