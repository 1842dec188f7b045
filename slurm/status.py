"""Where a run's jobs are, in words, and stopping them."""

from collections.abc import Mapping
from pathlib import Path
from typing import TypedDict

from mcit.data_prep.errors import InputError
from mcit.pipeline.recipe.loading import load_recipe
from mcit.pipeline.run.status import Status, run_status
from mcit.pipeline.run.step import Launch
from mcit.pipeline.run.steps import Run
from mcit.pipeline.run.sweep import Sweep, SweepStatus, sweep_status
from mcit.pipeline.run.terminal import Terminal

from .cluster import JobState, scancel, states
from .jobs import Submitted, queued_of, read_submitted


class JobStatus(TypedDict):
    """A job of a run; part of what `mcit status --json` prints."""

    name: str
    id: str
    state: str | None  # SLURM's word; None: SLURM does not answer, or has forgotten the job
    note: str  # what it waits for, why it did not start, where to look after a failure
    steps: list[str]


class JobsStatus(Status):
    """A run's steps, those rows apart that jobs evaluate, and its jobs."""

    jobs: list[JobStatus]
    remark: str  # on the jobs as a whole; "" if there is none


class JobsSweepStatus(SweepStatus):
    """The same of a sweep; `jobs` holds the one for its own results."""

    jobs: list[JobStatus]
    remark: str


def full_status(path: Path) -> JobsStatus | JobsSweepStatus:
    """What `mcit status --json` prints of a run or a sweep. Raises `InputError` if there is none."""
    recipe, launch = load_recipe(path, check_methods=False), Launch.named("single")

    def with_jobs(run: Run) -> JobsStatus:
        jobs, remark = job_status(run.dir, path)
        rows = [int(job["name"].removeprefix("eval-")) for job in jobs if job["name"].startswith("eval-")]
        return {**run_status(run, rows), "jobs": jobs, "remark": remark}

    if not recipe.sweep:
        return with_jobs(Run(recipe, path, launch))
    sweep = Sweep(recipe, path, launch)
    runs = {member.name: with_jobs(sweep.run(member)) for member in sweep.members}
    jobs, remark = job_status(path, path)
    remarks = filter(None, [remark, *(run["remark"] for run in runs.values())])
    return {**sweep_status(sweep), "runs": dict(runs), "jobs": jobs, "remark": next(remarks, "")}


def job_status(run_dir: Path, whole: Path) -> tuple[list[JobStatus], str]:
    """The jobs of a run in order, and what is to be said of them, if anything is; `whole` is the run, or its sweep."""
    jobs, remark = read_submitted(run_dir), ""
    try:
        found = states([job["id"] for job in jobs.values()])
    except InputError as error:  # a run can be looked at where there is no SLURM
        found, remark = {}, f"what SLURM says is not known: {error}"
    blames = {name: first for name in jobs if (first := _first_to_fail(name, jobs, found))}
    if blames and not any(state.is_active for state in found.values()):
        remark = f"jobs did not end well; `mcit submit {whole}` submits what is left"
    listed: list[JobStatus] = []
    for name, job in jobs.items():
        state = found.get(job["id"])
        note = _note(name, jobs, found, blames) if state else ""
        word = state.state if state else None
        listed.append({"name": name, "id": job["id"], "state": word, "note": note, "steps": job["steps"]})
    return listed, remark


def _note(
    name: str, jobs: Mapping[str, Submitted], found: Mapping[str, JobState], blames: Mapping[str, list[str]]
) -> str:
    job, state = jobs[name], found[jobs[name]["id"]]
    if name in blames:
        if Path(job["log"]).exists():
            return f"see {job['log']}"
        others = [f"{other} is {found[jobs[other]['id']].state}" for other in blames[name] if other != name]
        return f"never started: {', '.join(others)}" if others else "never started"
    before = {other: found.get(jobs[other]["id"]) for other in job["after"] if other in jobs}
    awaited = [other for other, its in before.items() if its and its.is_active]
    if state.reason == "Dependency" and awaited:
        return f"after {', '.join(awaited)}"
    return state.reason if state.is_active else ""


def _first_to_fail(name: str, jobs: Mapping[str, Submitted], found: Mapping[str, JobState]) -> list[str]:
    """Of a job that ended badly: which did so first, among those it came after; else itself. Empty if it did not."""
    state = found.get(jobs[name]["id"]) if name in jobs else None
    if state is None or state.is_active or state.state == "COMPLETED":
        return []
    before = [first for other in jobs[name]["after"] for first in _first_to_fail(other, jobs, found)]
    return list(dict.fromkeys(before)) or [name]


def cancel(path: Path, terminal: Terminal) -> None:
    """Cancel what is queued or running of a run or a sweep. Raises `InputError`."""
    folders = [*(record.parent.parent for record in sorted(path.glob("*/slurm/jobs.json"))), path]
    if not any(map(read_submitted, folders)):
        raise InputError("has no SLURM jobs", where=path)
    queued = [(folder, name, id) for folder in folders for name, id in queued_of(folder).items()]
    scancel([id for _, _, id in queued])
    for folder, name, id in queued:
        terminal.say(f"cancelled {folder.name}: {name}, job {id}")
    if not queued:
        terminal.say("nothing is queued or running")
