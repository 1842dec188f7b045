"""What is done, running and left of a run, derived from the markers and locks of its steps."""

from collections.abc import Iterable
from pathlib import Path
from typing import Literal, TypedDict

from mcit.data_prep.files import write_json
from mcit.eval.results import StageCost

from ..recipe.loading import load_recipe
from ..stage.workplace import Progress, read_progress, work_folder
from .locks import Owner, holder
from .step import Launch
from .steps import Run

State = Literal["done", "running", "left"]


class StepStatus(TypedDict):
    """One step; `seconds` when it is done, `owner` while it runs."""

    name: str
    title: str
    state: State
    seconds: float | None
    owner: Owner | None
    progress: Progress | None  # of a stage that has begun and is not done
    cost: StageCost | None  # of a stage that is done


class Status(TypedDict):
    """`RUN/status.json` and what `mcit status --json` prints."""

    name: str
    state: State  # of the whole: done when all steps are, running when one is
    seconds: float  # of the steps that are done
    steps: list[StepStatus]


def run_status(run: Run, rows: Iterable[int] = ()) -> Status:
    """The state of every step of a run as its files tell it now; `rows` are evaluated each by itself."""
    steps: list[StepStatus] = []
    for step in run.steps(rows):
        owner = holder(run.lock(step))
        # Results, report and publication can be had of what there is; they are not done before everything else is.
        early = step.name in ("results", "report", "publish") and any(before["state"] == "left" for before in steps)
        marker = None if owner or early else step.done()
        state: State = "running" if owner else "done" if marker else "left"
        seconds = marker["seconds"] if marker else None
        progress = read_progress(work_folder(step.marker.parent)) if step.name.startswith("train/") else None
        cost = ((marker or {}).get("trained") or {}).get("cost")
        steps.append(
            {
                "name": step.name,
                "title": step.title,
                "state": state,
                "seconds": seconds,
                "owner": owner,
                "progress": None if marker else progress,
                "cost": cost,
            }
        )
    states = {step["state"] for step in steps}
    return {
        "name": run.recipe.name,
        "state": "running" if "running" in states else "left" if "left" in states else "done",
        "seconds": round(sum(step["seconds"] or 0.0 for step in steps), 3),
        "steps": steps,
    }


def write_status(run: Run) -> None:
    """Write `RUN/status.json`."""
    write_json(run.dir / "status.json", run_status(run))


def read_run(run_dir: Path) -> Run:
    """A run by its directory, without importing its methods. Raises `InputError`."""
    return Run(load_recipe(run_dir, check_methods=False), run_dir, Launch.named("single"))
