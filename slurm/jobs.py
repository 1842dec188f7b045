"""A run as jobs: which steps each does, by which command, and after which others."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from mcit.data_prep.files import read_json, write_json
from mcit.pipeline.run.step import Step
from mcit.pipeline.run.steps import Run

from .cluster import states
from .profile import Kind


@dataclass(frozen=True)
class Job:
    """One job of a run."""

    name: str  # prepare, train-1, eval-0, report
    kind: Kind
    title: str  # for people
    command: str  # what follows `mcit`, with $run for the run directory
    after: tuple[str, ...]  # the jobs that must have ended well
    steps: tuple[Step, ...]
    serving: str = ""  # what follows `mcit` on a node of its own, beside the others'


class Submitted(TypedDict):
    """A job as it was submitted, in `RUN/slurm/jobs.json`."""

    id: str  # SLURM's; a member of an array has an underscore in it
    after: list[str]  # names of jobs
    steps: list[str]
    log: str


def jobs_of(run: Run, training: Sequence[str]) -> list[Job]:
    """The jobs of a run in an order in which each comes after what it needs; `training` are options of `mcit train`.

    prepare → train-1 → train-2 → …; each stage is evaluated beside the training of the next, and the report is last.
    """
    stages, rows = run.recipe.stages, run.rows()
    jobs = [Job("prepare", "prepare", "prepare and check the data", 'prepare "$run"', (), tuple(run.preparation()))]
    if 0 in rows:
        jobs.append(_evaluation(run, 0))
    for stage in stages:
        step, before = run.train(stage), f"train-{stage.k - 1}" if stage.k > 1 else "prepare"
        command = f'train "$run" --stage {stage.k} {shlex.join(training)}'
        serving = f'rollouts "$run" --stage {stage.k}' if stage.train.needs_server else ""
        jobs.append(Job(f"train-{stage.k}", "train", step.title, command, (before,), (step,), serving))
        if stage.k in rows:
            jobs.append(_evaluation(run, stage.k))
    last = (run.evaluate(), *run.judging(), *run.reporting())
    evaluations = tuple(job.name for job in jobs if job.kind == "eval")
    jobs.append(Job("report", "report", "results and report", 'eval "$run"', evaluations, last))
    if publication := run.publication():
        jobs.append(Job("publish", "report", publication[0].title, 'publish "$run"', ("report",), tuple(publication)))
    return jobs


def _evaluation(run: Run, k: int) -> Job:
    step, before = run.evaluate(row=k), f"train-{k}" if k else "prepare"
    return Job(f"eval-{k}", "eval", step.title, f'eval "$run" --stage {k}', (before,), (step,))


def sweep_job() -> Job:
    """The job that gathers what the runs of a sweep agree on, after the last of each; its run is the sweep."""
    return Job("sweep", "report", "results of the sweep", 'run "$run"', ("report",), ())


def left_of(jobs: Sequence[Job]) -> set[str]:
    """The names of the jobs that still have something to do, among them all that come after another that has."""
    left: set[str] = set()
    for job in jobs:
        if not left.isdisjoint(job.after) or not all(map(_is_done, job.steps)):
            left.add(job.name)
    return left


def _is_done(step: Step) -> bool:
    if step.name.startswith("evaluate/"):  # its answers count, whoever asked for them
        return step.inputs() is not None and step.there()
    return step.done() is not None


def read_submitted(run_dir: Path) -> dict[str, Submitted]:
    """The jobs of a run by name; none if it was never submitted."""
    path = _record(run_dir)
    return read_json(path) if path.exists() else {}


def write_submitted(run_dir: Path, jobs: dict[str, Submitted]) -> None:
    """Keep which jobs a run has."""
    write_json(_record(run_dir), jobs)


def queued_of(run_dir: Path) -> dict[str, str]:
    """The ids of a run's jobs that are queued or running, by name. Raises `InputError` if SLURM does not answer."""
    ids = {name: job["id"] for name, job in read_submitted(run_dir).items()}
    found = states(ids.values())
    return {name: id for name, id in ids.items() if id in found and found[id].is_active}


def _record(run_dir: Path) -> Path:
    return run_dir / "slurm" / "jobs.json"
