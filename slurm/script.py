"""The job scripts, from the template `job.sbatch`."""

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, StrictUndefined, Template

from mcit.data_prep.files import atomic_open

from .jobs import Job
from .profile import Options, Site, as_arguments


def write_script(folder: Path, name: str, job: Job, members: Sequence[str], site: Site) -> Path:
    """Write `folder/slurm/<job>.sbatch`, for the run in `folder` or, by array index, its subfolders `members`.

    `name` is what the queue shows the job by.
    """
    path = folder / "slurm" / f"{job.name}.sbatch"
    own: Options = {
        "job-name": f"{name}.{job.name}",
        "chdir": os.getcwd(),  # where modules of the user's own may be
        "output": str(folder / "slurm" / f"{job.name}.{'%A_%a' if members else '%j'}.out"),
        "open-mode": "append",  # a job that queues again goes on in its log
        "requeue": True,
        "signal": "B:USR1@120",
        "kill-on-invalid-dep": "yes",
    }
    profile = site.profile
    python = [sys.executable, "-P", "-m", "mcit.pipeline.cli"]
    text = _template().render(
        name=name,
        job=job,
        options=map(shlex.quote, as_arguments({**own, **site.sbatch(job.kind, spare=bool(job.serving))})),
        modules=profile.modules,
        environment=profile.environment,
        folder=str(folder),
        members=members,
        nodes=site.nodes if job.kind == "train" else 1,
        srun=shlex.join(as_arguments({"kill-on-bad-exit": 1, **profile.srun})),
        vllm=shlex.join(as_arguments(site.vllm)),
        mcit=f"{profile.container} mcit" if profile.container else shlex.join(python),
        restarts=profile.restarts,
    )
    with atomic_open(path) as file:
        file.write(text)
    return path


def _template() -> Template:
    environment = Environment(
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, undefined=StrictUndefined
    )
    environment.filters["quote"] = lambda value: shlex.quote(str(value))
    return environment.from_string(Path(__file__).with_name("job.sbatch").read_text(encoding="utf-8"))
