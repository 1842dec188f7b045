"""The verb of `mcit` that says what a run will take."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .options import AsJson, Gpus, LaunchOption, Overrides, RecipeArgument, With, print_json

if TYPE_CHECKING:
    from ..planning.plan import Plan
    from ..run.terminal import Terminal

_GIB = 2**30


def plan(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    with_method: With = None,
    launch: LaunchOption = "single",
    gpus: Gpus = None,
    measured: Annotated[
        list[Path] | None,
        typer.Option(metavar="RUN", help="Runs with the same base to take times from. Default: runs/*."),
    ] = None,
    gpu_memory: Annotated[
        float | None, typer.Option(metavar="GIB", help="Of one GPU. Default: this machine's, if it has one.")
    ] = None,
    tflops: Annotated[
        float | None, typer.Option(help="Peak of one GPU in the base's dtype: for times where none was measured.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say what a run will take: steps, tokens, generations, memory, disk, hours, and what will not fit.

    The data are prepared on the way, into the cache, and the model's shapes read from its configuration; nothing is
    trained. docs/single-gpu.md has the formulas.

    Example: `mcit plan coin/sefe data=/data/CoIN --gpu-memory 24`
    """
    from mcit.eval.hashing import hub_commit

    from ..planning.plan import Machine, known_runs
    from ..planning.plan import plan as plan_run
    from ..recipe.loading import load_recipe
    from ..run.doctor import gpu_gib
    from ..run.runner import check_recipe
    from ..run.step import Launch
    from ..run.terminal import Terminal

    loaded = load_recipe(recipe, overrides or (), with_method or ())
    machine = Machine(Launch.named(launch, gpus), gpu_memory or gpu_gib(), tflops)
    check_recipe(loaded, machine.launch)
    if not Path(loaded.base_model.path).is_dir():
        hub_commit(loaded.base_model.path, loaded.base_model.revision)  # or one line says why there is none
    terminal = Terminal()
    with terminal.working("plan"):
        found = plan_run(loaded, machine, known_runs(measured or []))
    if as_json:
        print_json(found)
    else:
        _show(found, terminal)


def _show(found: "Plan", terminal: "Terminal") -> None:
    generates = any(row["generations"] for row in found["stages"])
    rows = [
        (
            f"{row['stage']} {row['name']} ({row['paradigm']})",
            row["samples"],
            row["steps"],
            row["tokens"],
            *([row["generations"] or None] if generates else []),
            f"{row['memory_total'] / _GIB:.2f}",
            f"{row['host_memory'] / _GIB:.1f}",
            _time(row["seconds"]),
        )
        for row in found["stages"]
    ]
    columns = ["stage", "samples", "steps", "tokens", *(["generations"] if generates else []), "memory", "RAM", "time"]
    terminal.table(f"{found['name']}: training (memory and RAM: GiB of each process)", columns, rows)
    again = f", up to {found['answers_again']} more in other ways" if found["answers_again"] else ""
    terminal.say(
        f"evaluation: {found['answers']} answers{again}, of {found['answer_tokens']} tokens in all at most; "
        f"vLLM in {found['engine_memory_total'] / _GIB:.2f} GiB at the least; time {_time(found['answer_seconds'])}"
    )
    if found["judged"]:
        limit = f"of {found['judged_tokens']} tokens in all" if found["judged_tokens"] else "of any length"
        terminal.say(f"judging: {found['judged']} questions at most, replies {limit}")
    parts = ", ".join(f"{name.replace('_', ' ')} {size / 1e9:.3f} GB" for name, size in found["disk"].items())
    terminal.say(f"disk: {parts}")
    terminal.say(f"time in all: {_time(found['seconds'])}", "bold")
    for note in found["notes"]:
        terminal.say(note, "dim")
    for misfit in found["misfits"]:
        terminal.say(f"will not fit: {misfit}", "yellow")


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "not known"
    return f"{seconds:.0f} s" if seconds < 600 else f"{seconds / 3600:.2f} h"
