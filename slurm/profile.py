"""Where and on what jobs run: a site's profile (a YAML file) and the command line. No part of a recipe or its hash."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import Field, ValidationError

from mcit.data_prep.errors import InputError
from mcit.data_prep.files import read_text
from mcit.data_prep.schema import Config
from mcit.pipeline.recipe.layers import RECIPES, nearest
from mcit.pipeline.recipe.text import parse_yaml
from mcit.pipeline.run.step import Launch

Kind = Literal["prepare", "train", "eval", "report"]
Value = str | int | float | bool | None
Options = dict[str, Value]  # long options without their dashes; true: a flag, null: none

# What the job scripts rely on, by what to do instead.
_OWNED = {
    "It follows from the job": ["job-name", "output", "array", "dependency", "kill-on-invalid-dep", "chdir", "wrap"],
    "Jobs are stopped and queued again by their own scripts": ["requeue", "no-requeue", "signal", "open-mode"],
    "Use the command line: --nodes, --gpus-per-node": ["nodes", "gpus-per-node", "ntasks", "ntasks-per-node", "gpus"],
    "`mcit submit` reads what sbatch prints": ["parsable", "quiet", "verbose", "test-only", "wait"],
}
OWNED = {name: instead for instead, names in _OWNED.items() for name in names}


class Profile(Config):
    """`--profile FILE`: what a site's cluster wants to be told."""

    sbatch: Options = Field(default_factory=dict)  # of every job: partition, account, cpus-per-task, mem, …
    jobs: dict[Kind, Options] = Field(default_factory=dict)  # of one kind of job, over the above and the command line
    srun: Options = Field(default_factory=dict)  # of the step in each job, e.g. container-image
    vllm: Options = Field(default_factory=dict)  # of the server on a node of its own, e.g. tensor-parallel-size
    modules: list[str] = Field(default_factory=list)  # `module load …`
    environment: dict[str, str | int | float] = Field(default_factory=dict)
    container: str = ""  # a command that runs another one inside an image: apptainer exec --nv /images/mcit.sif
    restarts: int = Field(default=20, ge=0)  # how often a job that was asked to stop queues again


def read_profile(path: Path | None) -> Profile:
    """The profile in a file; none is an empty one. Raises `InputError` with the key that is wrong."""
    if path is None:
        return Profile()
    values = parse_yaml(read_text(path), str(path))
    if not isinstance(values, dict):
        raise InputError("is not a mapping of keys", where=path, remedy=nearest("", Profile.model_fields))
    try:
        profile = Profile.model_validate(values, strict=True)
    except ValidationError as error:
        raise _refusal(error, path) from None
    for section, options in (("sbatch", profile.sbatch), *((f"jobs.{kind}", o) for kind, o in profile.jobs.items())):
        for name in options:
            if name in OWNED:
                raise InputError("is set by mcit", where=path, field=f"{section}.{name}", remedy=OWNED[name])
    return profile


@dataclass(frozen=True)
class Site:
    """A profile and what the command line says beside it."""

    profile: Profile
    options: Mapping[str, Value]  # of sbatch, for every job
    nodes: int = 1
    gpus: int = 1  # on each node; 0 trains on the CPU
    launch: str | None = None  # default: single for one process, else ddp

    @property
    def launcher(self) -> Launch:
        """How stages are started. Raises `InputError`."""
        each = max(self.gpus, 1)
        return Launch.named(self.launch or ("ddp" if self.nodes * each > 1 else "single"), each, self.nodes)

    @property
    def training(self) -> list[str]:
        """The options of `mcit train` that say the same."""
        launcher, gpus = self.launcher, str(max(self.gpus, 1))
        packaged = launcher.config.parent == RECIPES / "accelerate"
        name = launcher.config.stem if packaged else str(launcher.config.resolve())
        nodes = ["--nodes", str(self.nodes)] if self.nodes > 1 else []
        return ["--launch", name, "--gpus", gpus, *nodes] if launcher.processes > 1 or not packaged else []

    @property
    def vllm(self) -> Options:
        """Options of the server on a node of its own: a copy of the model on each GPU, unless the profile says else."""
        shares = {"data-parallel-size", "tensor-parallel-size"} & self.profile.vllm.keys()
        return ({"data-parallel-size": self.gpus} if self.gpus > 1 and not shares else {}) | self.profile.vllm

    def sbatch(self, kind: Kind, spare: bool = False) -> Options:
        """The sbatch options of a kind of job.

        Training gets all nodes and their GPUs, and a `spare` one where vLLM answers; evaluation one GPU, preparation
        and report none. Where the profile names a `gres`, that is how its site counts GPUs.
        """
        named: Options = {**self.profile.sbatch, **self.options, **self.profile.jobs.get(kind, {})}
        gpus = {"train": self.gpus, "eval": min(self.gpus, 1)}.get(kind, 0)
        size: Options = {"nodes": self.nodes + spare if kind == "train" else 1, "ntasks-per-node": 1}
        return size | ({"gpus-per-node": gpus} if gpus and "gres" not in named else {}) | named


def as_arguments(options: Mapping[str, Any]) -> list[str]:
    """Long options as a command line has them."""
    chosen = {name: value for name, value in options.items() if value is not None and value is not False}
    return [f"--{name}" if value is True else f"--{name}={value}" for name, value in chosen.items()]


def _refusal(error: ValidationError, path: Path) -> InputError:
    """The first error as one line, with the nearest key that would be right."""
    first = error.errors(include_url=False)[0]
    field = ".".join(str(part) for part in first["loc"] if part != "[key]")
    known: Iterable[str] = {"jobs": get_args(Kind)}.get(str(first["loc"][0]), tuple(Profile.model_fields))
    if first["type"] == "extra_forbidden" or first["loc"][-1] == "[key]":
        return InputError("unknown key", where=path, field=field, remedy=nearest(str(field.split(".")[-1]), known))
    return InputError(first["msg"], where=path, field=field)
