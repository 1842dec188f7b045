"""Submitting what is left of a run, or of the runs of a sweep, as SLURM jobs that depend on each other."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mcit.data_prep.errors import InputError
from mcit.pipeline.recipe.loading import dump_recipe
from mcit.pipeline.recipe.orders import members
from mcit.pipeline.recipe.schema import Recipe
from mcit.pipeline.run.locks import holder
from mcit.pipeline.run.runner import settle, start_run
from mcit.pipeline.run.steps import Run
from mcit.pipeline.run.sweep import start_sweep
from mcit.pipeline.run.terminal import Terminal

from .cluster import need, sbatch, scancel
from .jobs import Job, Submitted, jobs_of, left_of, queued_of, read_submitted, sweep_job, write_submitted
from .profile import Site
from .script import write_script


@dataclass(eq=False)
class Submission:
    """One call of sbatch: a job of one run, or an array, the same job of several."""

    job: Job
    after: "tuple[Submission | str, ...]"  # of this call, or ids of jobs that are queued or running already
    runs: dict[int, str] = field(default_factory=dict)  # place among all runs → folder
    is_array: bool = False
    id: str = ""  # once it is submitted

    @property
    def options(self) -> list[str]:
        """What sbatch is told beside the script."""
        told = [f"--array={','.join(map(str, self.runs))}"] if self.is_array else []
        after = ",".join(map(self._dependency, self.after))
        return [*told, f"--dependency={after}"] if after else told

    @property
    def waits_for(self) -> str:
        """The same for people."""
        return ", ".join(f"job {other}" if isinstance(other, str) else other.job.name for other in self.after)

    def _dependency(self, other: "Submission | str") -> str:
        if isinstance(other, str):
            return f"afterok:{other}"
        kind = "aftercorr" if self.is_array and other.is_array else "afterok"  # each member after its counterpart
        return f"{kind}:{other.id or f'<{other.job.name}>'}"


def submit(recipe: Recipe, directory: Path, site: Site, terminal: Terminal, dry_run: bool = False) -> None:
    """Write the job scripts of what is left, in `directory/slurm/`, and submit them; `dry_run` only writes.

    The runs of a sweep share jobs, as arrays. Jobs that are queued or running are left as they are, and others wait for
    them. Raises `InputError`, and then no job of this call is left in the queue.
    """
    if not dry_run:
        need("sbatch")
    directory = directory.resolve()
    queued = _queued(recipe, directory, site)
    runs = _runs(recipe, directory, site, terminal)
    jobs = {name: jobs_of(run, site.training) for name, run in runs.items()}
    plan = plan_submissions(jobs, {name: left_of(each) for name, each in jobs.items()}, queued, bool(recipe.sweep))
    _refuse_running([(runs[name], call.job) for call in plan for name in call.runs.values()])
    if recipe.sweep and (plan or not (directory / "results.json").exists()) and not queued_of(directory):
        reports = [call for call in plan if call.job.name == "report"]
        plan.append(Submission(sweep_job(), (*reports, *(ids["report"] for ids in queued.values() if "report" in ids))))
    if not plan:
        terminal.say("nothing to submit: " + ("all that is left is queued" if any(queued.values()) else "all is done"))
        return
    scripts = {
        call.job.name: write_script(directory, recipe.name, call.job, list(runs) if call.is_array else [], site)
        for call in plan
    }
    if dry_run:
        for call in plan:
            terminal.say(" ".join(["sbatch", *call.options, str(scripts[call.job.name])]))
        return
    _send(plan, directory, scripts)
    rows = [(call.job.name, call.id, call.waits_for, call.job.title) for call in plan]
    terminal.table(f"submitted: {directory}", ("job", "id", "after", "does"), rows)
    terminal.say(f"`mcit status {directory}` says where they are, `mcit cancel {directory}` stops them")


def plan_submissions(
    jobs: Mapping[str, Sequence[Job]],
    left: Mapping[str, set[str]],
    queued: Mapping[str, Mapping[str, str]],
    arrays: bool,
) -> list[Submission]:
    """What to submit, in order, of one run, or as `arrays` of several.

    `left` and `queued` (job → id) are by run. Runs whose job waits for the same submissions share an array; a job that
    is queued already belongs to one run, and so does what waits for it.
    """
    plan: list[Submission] = []
    made: dict[tuple[str, str], Submission] = {}
    by_name = {run: {job.name: job for job in each} for run, each in jobs.items()}
    for name in _in_order(jobs.values()):
        together: dict[tuple[Submission | str, ...], Submission] = {}
        for place, (run, own) in enumerate(by_name.items()):
            if name not in left[run] or name in queued[run]:
                continue
            before = [other for other in own[name].after if other in left[run]]
            after = tuple(made[run, other] if (run, other) in made else queued[run][other] for other in before)
            submission = together.setdefault(after, Submission(own[name], after, is_array=arrays))
            submission.runs[place] = run
            made[run, name] = submission
        plan += together.values()
    return plan


def _in_order(jobs: Iterable[Sequence[Job]]) -> list[str]:
    """The names of the jobs of several runs, each after what it needs. An order of the tasks can have fewer stages."""
    longest_first = sorted(jobs, key=len, reverse=True)
    names = dict.fromkeys(job.name for each in longest_first for job in each)
    return sorted(names, key=lambda name: name == "report")


def _queued(recipe: Recipe, directory: Path, site: Site) -> dict[str, dict[str, str]]:
    """The jobs that are queued or running, of each run. Raises `InputError` if they are for another recipe."""
    before = settle(recipe, directory, site.launcher)
    names = [member.name for member in members(recipe)] if recipe.sweep else [""]
    queued = {name: queued_of(directory / name) for name in names}
    if any(queued.values()) and before != dump_recipe(recipe):
        ids = ", ".join(id for jobs in queued.values() for id in jobs.values())
        remedy = f"Stop them first: `mcit cancel {directory}`"
        raise InputError(f"jobs {ids} are queued or running, for another recipe", where=directory, remedy=remedy)
    return queued


def _runs(recipe: Recipe, directory: Path, site: Site, terminal: Terminal) -> dict[str, Run]:
    """The run in a directory, called "", or those of a sweep, made or taken up. Raises `InputError`."""
    if not recipe.sweep:
        return {"": start_run(recipe, directory, site.launcher, terminal)}
    sweep = start_sweep(recipe, directory, site.launcher, terminal)
    return {member.name: sweep.run(member) for member in sweep.members}


def _refuse_running(wanted: Sequence[tuple[Run, Job]]) -> None:
    """A step that another process does at this moment is none to submit. Raises `InputError`."""
    for run, job in wanted:
        for step in job.steps:
            if owner := holder(run.lock(step)):
                by = f"process {owner['pid']} on {owner['host']} since {owner['since']}"
                raise InputError(f"{step.title} is being done by {by}", where=run.dir, remedy="Wait for it or stop it")


def _send(plan: Sequence[Submission], directory: Path, scripts: Mapping[str, Path]) -> None:
    """Submit in order, and keep beside each run which jobs it has. All or nothing. Raises `InputError`."""
    folders = {directory / name for each in plan for name in each.runs.values() or [""]}
    before = {folder: read_submitted(folder) for folder in folders}
    try:
        for each in plan:
            each.id = sbatch(scripts[each.job.name], each.options)
            for place, name in each.runs.items() or [(0, "")]:
                id = f"{each.id}_{place}" if each.is_array else each.id
                log = directory / "slurm" / f"{each.job.name}.{id}.out"
                entry = Submitted(
                    id=id, after=list(each.job.after), steps=[s.name for s in each.job.steps], log=str(log)
                )
                write_submitted(directory / name, {**read_submitted(directory / name), each.job.name: entry})
    except BaseException as error:
        for folder, entries in before.items():
            write_submitted(folder, entries)
        sent = [each.id for each in plan if each.id]
        scancel(sent)
        if isinstance(error, InputError) and sent:
            raise InputError(str(error), remedy=f"The jobs before it are cancelled: {', '.join(sent)}") from None
        raise
