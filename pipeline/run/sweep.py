"""Running a sweep: each of its runs in a folder of its own, then what they agree on."""

from collections.abc import Set
from pathlib import Path
from typing import TypedDict

from mcit.data_prep.files import read_json, write_json
from mcit.eval.results import read_results
from mcit.eval.sweep import assemble_sweep

from ..recipe.orders import Member, members
from ..recipe.schema import Recipe
from .beside import perform_run
from .runner import start_run, take_up
from .status import State, Status, run_status
from .step import Launch
from .steps import Run
from .terminal import Terminal


class SweepStatus(TypedDict):
    """`RUN/status.json` of a sweep."""

    name: str
    state: State  # of the whole: done when all runs are, running when one is
    seconds: float
    runs: dict[str, Status]


class Sweep:
    """A recipe with a `sweep`, its directory, and the runs in it."""

    def __init__(self, recipe: Recipe, directory: Path, launch: Launch):
        self.recipe, self.dir, self.launch = recipe, directory, launch
        self.members: list[Member] = list(members(recipe))

    def run(self, member: Member) -> Run:
        """One of the runs. What they share (prepared data, the answers of row 0) lies in the cache, by content."""
        return Run(member.recipe, self.dir / member.name, self.launch)


def start_sweep(recipe: Recipe, run_dir: Path, launch: Launch, terminal: Terminal) -> Sweep:
    """Make or take up the directory of a sweep and those of its runs. Raises `InputError`."""
    take_up(recipe, run_dir, launch, terminal)  # first: the runs are to share what it pins
    sweep = Sweep(recipe, run_dir.resolve(), launch)
    for member in sweep.members:
        start_run(member.recipe, sweep.dir / member.name, launch, terminal)
    return sweep


def run_sweep(sweep: Sweep, terminal: Terminal, beside: str | None = None) -> None:
    """Do what is left of every run, one after the other; the sweep's results are those of the runs that are done.

    `beside`: see `perform_run`. Raises `InputError` and `ChildFailed`; what was done stays done.
    """
    done = {name for name, status in sweep_status(sweep)["runs"].items() if status["state"] == "done"}
    for number, member in enumerate(sweep.members, 1):
        terminal.say(f"{member.name}, {number} of {len(sweep.members)}", "bold")
        run = sweep.run(member)
        perform_run(run, terminal, beside)
        done.add(member.name)
        _gather(sweep, done)
    write_json(sweep.dir / "status.json", sweep_status(sweep))


def _gather(sweep: Sweep, done: Set[str]) -> None:
    """Write results and report of a sweep from its runs that are `done`, unless nothing is new."""
    from mcit.eval.report.sweep import write_sweep_report  # here: needs matplotlib

    runs = [member for member in sweep.members if member.name in done]
    found = [(member.name, member.order, read_results(sweep.dir / member.name)) for member in runs]
    results, path = assemble_sweep(sweep.recipe.name, found), sweep.dir / "results.json"
    page = sweep.dir / "report" / "index.html"
    if not page.exists() or not path.exists() or read_json(path) != results:
        write_json(path, results)
        write_sweep_report([sweep.dir], page.parent)


def sweep_status(sweep: Sweep) -> SweepStatus:
    """The state of every run as its files tell it now."""
    runs = {member.name: run_status(sweep.run(member)) for member in sweep.members}
    states = {status["state"] for status in runs.values()}
    return {
        "name": sweep.recipe.name,
        "state": "running" if "running" in states else "left" if "left" in states else "done",
        "seconds": round(sum(status["seconds"] for status in runs.values()), 3),
        "runs": runs,
    }
