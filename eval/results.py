"""`RUN/results.json`: what a run measured. `eval/gathering.py` fills it in."""

from pathlib import Path
from typing import Any, NotRequired, TypedDict, cast

from mcit.data_prep.errors import InputError
from mcit.data_prep.files import read_json, write_json

from .forgetting import Forgetting
from .general import General
from .intervals import Bounds
from .reasoning import Reasoning
from .scoring import Verdict
from .stability import Curves

SCHEMA_VERSION = 1


class TaskInfo(TypedDict):
    """A column of the matrix."""

    name: str
    style: str
    scorer: str  # a kind, a protocol, or module:function
    n: int  # samples of the test part


class StageInfo(TypedDict):
    """A row of the matrix. Stage 0 is the untouched base."""

    k: int
    # "base" ("start", if the run goes on from another: then, too, the folder is stages/00-base), or the names of its
    # tasks joined by "+": the folder is stages/<kk>-<name>
    name: str
    tasks: list[str]


class Constrained(TypedDict):
    """The same questions with the answers held to the form asked for. Tables are shaped like `matrix`."""

    matrix: list[list[float | None]]  # mean score, 0–100
    shown: list[list[float | None]]  # of the free answers to these questions, above chance; see mcit.eval.forgetting
    known: list[list[float | None]]  # of the constrained ones, above chance
    stderr: list[list[float | None]]  # of `known`, clustered by image
    n: list[list[int | None]]  # questions that have a form to be held to
    left_out: dict[str, str]  # tasks that have none, and why


class Images(TypedDict):
    """Whether answers come from the image: scores of the same samples with it and without, shaped like `matrix`."""

    true: list[list[float | None]]  # as they are
    swapped: list[list[float | None]]  # with the images of another sample
    blank: list[list[float | None]]  # with grey ones
    n: list[list[int | None]]


class Served(TypedDict):
    """How the policy of a stage was served."""

    engines: list[str]  # those that gave its answers
    log_prob_gap: float | None  # in nats, the largest to transformers with the adapter on the base; of the probes


class Hashes(TypedDict):
    """What the numbers depend on, as SHA-256."""

    recipe: str | None  # the resolved recipe, without hardware
    data: dict[str, str]  # task → its samples and images
    policies: list[str | None]  # stage → what was served; None where the stage has not been trained


class StageCost(TypedDict):
    """What the training of a stage took, over all its processes and attempts."""

    steps: int  # of the optimizer
    samples: int  # that it learned from, each as often as it did; of RFT completions
    tokens: int  # of those, images included; of RFT prompts and completions
    process_hours: float  # by the clock
    processor_hours: NotRequired[float]  # of their threads at work, without other processes that they start
    gpu_hours: float  # 0 without a GPU
    peak_host_bytes: int  # resident, of the process that took most
    peak_gpu_bytes: int | None  # allocated, of the process that took most


class Seconds(TypedDict):
    """Wall-clock time of the steps that are done."""

    train: list[float | None]  # stage → tuning; of the base: reading and hashing it; None for stages not done
    evaluate: list[list[float | None]]  # same shape as the matrix
    total: float


class Results(TypedDict):
    """`RUN/results.json`. Rows are stages 0…K, columns tasks; a cell that was not evaluated is None."""

    schema_version: int
    name: str
    seed: int
    method: dict[str, Any]  # the resolved `method:` of the recipe; {} is sequential tuning
    tasks: list[TaskInfo]  # in the order they were learned
    stages: list[StageInfo]
    learned: dict[str, int]  # task → the stage that first trained it
    matrix: list[list[float | None]]  # mean score, 0–100
    row0: bool  # always True: the first row is the base
    stderr: list[list[float | None]]  # of each mean, clustered by image
    n: list[list[int | None]]  # answers behind each mean
    engines: NotRequired[list[list[str | None]]]  # who answered: some policies only transformers serves
    verdicts: list[list[dict[Verdict, float] | None]]  # shares, summing to 1
    content: NotRequired[list[list[float | None]]]  # mean score of what the answers say, whatever their form
    metrics: dict[str, float | None]  # see mcit.eval.metrics and, where measured, mcit.eval.stability and the like
    intervals: NotRequired[dict[str, Bounds]]  # of the metrics, over other test samples: see mcit.eval.intervals
    constrained: NotRequired[Constrained]  # where it was asked for, as all below
    forgetting: NotRequired[Forgetting]  # since each task was learned, split in superficial and essential
    images: NotRequired[Images]
    general: NotRequired[General]
    reasoning: NotRequired[Reasoning]  # of tasks with chains of thought, where they were judged
    curves: NotRequired[Curves]  # of the stages up to the first in which nothing was asked while it trained
    served: NotRequired[list[Served]]  # stage → how
    hashes: Hashes
    versions: dict[str, str]  # Python, and the installed packages that decide the numbers
    seconds: Seconds
    cost: NotRequired[list[StageCost | None]]  # stage → its training; None for the base and for stages not done


def write_results(run_dir: Path, results: Results) -> None:
    """Write `RUN/results.json`, atomically."""
    write_json(Path(run_dir) / "results.json", results)


def read_results(run_dir: Path) -> Results:
    """Read `RUN/results.json`. Raises `InputError` if it is missing, incomplete or of another version."""
    path = Path(run_dir) / "results.json"
    if not path.exists():
        raise InputError("no results yet", where=path, remedy="Finish the run with `mcit run`")
    content = read_json(path)
    found = content.get("schema_version") if isinstance(content, dict) else None
    if found != SCHEMA_VERSION:
        problem = f"has schema version {found}, expected {SCHEMA_VERSION}"
        raise InputError(problem, where=path, remedy="Run `mcit run` on the run's folder to write it anew")
    if missing := [key for key in Results.__annotations__ if key in Results.__required_keys__ and key not in content]:
        raise InputError("is missing", where=path, field=missing[0])
    return cast(Results, content)
