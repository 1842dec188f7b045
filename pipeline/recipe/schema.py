"""The recipe: one schema, validated before anything starts. `pipeline/recipe/layers.py` reads and merges its files."""

import contextlib
import os
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, ValidationError, field_validator
from pydantic_core import PydanticCustomError

from mcit.data_prep.errors import InputError
from mcit.data_prep.files import atomic_open
from mcit.data_prep.schema import AnchorConfig, AsdConfig, Config, PrepareConfig, TaskConfig
from mcit.eval.config import EvalConfig
from mcit.pipeline.policy.quantization import check_quantization
from mcit.pipeline.publishing.config import PublishConfig
from mcit.pipeline.recipe.layers import Layers, nearest, read_layers
from mcit.pipeline.recipe.orders import SweepConfig, members, resolve_orders
from mcit.pipeline.recipe.probes import resolve_general
from mcit.pipeline.recipe.refusals import refusal
from mcit.pipeline.recipe.schedule import RecurConfig
from mcit.pipeline.recipe.text import to_yaml
from mcit.pipeline.reinforcement.config import HARDWARE, RftSection
from mcit.pipeline.run.redaction import shaped_secrets

Lineage = Literal["continue", "stack", "fold", "independent", "full"]
Reference = Literal["base", "previous", "none"]
Paradigm = Literal["sft", "rft", "sft+rft"]
Phase = Literal["sft", "rft"]
# Of `train:`, what changes how long a training takes and not what comes of it.
WITHOUT_EFFECT = {"checkpoint_every"}


class ModelConfig(Config):
    """`base_model:`. `path` is a folder (relative to the recipe's file) or a Hub id."""

    path: str
    revision: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    quantization: Literal["none", "nf4"] = "none"  # of the frozen base while it is trained on; it is served in `dtype`
    processor: dict[str, Any] = Field(default_factory=dict)  # e.g. {min_pixels: …, max_pixels: …}
    trust_remote_code: bool = False


class ModulesConfig(Config):
    """What is trained: LoRA on linear layers, or under lineage `full` the weights themselves, embeddings included."""

    language: Literal["lora", "full"] = "lora"
    projector: Literal["frozen", "lora", "full"] = "frozen"
    vision: Literal["frozen", "lora", "full"] = "frozen"


class LoraSection(Config):
    """`train.lora:`. Defaults are SEFE's, CoIN LLaVA-1.5-7B (code)."""

    r: int = Field(default=128, gt=0)
    alpha: float = Field(default=256, gt=0)
    dropout: float = Field(default=0.05, ge=0, lt=1)


class SftSection(Config):
    """`train.sft:`. `args` go to `trl.SFTConfig` unchanged, except for what the pipeline owns (batch size, output)."""

    # Whether samples come in any order, or those on the same pictures one after the other, the pictures in any order.
    order: Literal["shuffled", "by_image"] = "shuffled"
    args: dict[str, Any] = Field(default_factory=dict)


class TrainConfig(Config):
    """`train:`. A task's `overrides` lay over it in the stages that train the task."""

    paradigm: Paradigm = "sft"
    lineage: Lineage = "stack"
    reference: Reference = "previous"
    modules: ModulesConfig = Field(default_factory=ModulesConfig)
    lora: LoraSection = Field(default_factory=LoraSection)
    global_batch_size: int = Field(default=128, gt=0)
    max_length: int | None = Field(
        default=None, gt=0
    )  # tokens of a sample, images included; default: the model's context
    packing: bool = False  # several samples in a row; what those on one picture, or answers to one prompt, share, once
    # Optimizer steps, or `90s`, `10m`, `2h`, or `never`, between checkpoints inside a stage. Changes no result.
    checkpoint_every: int | str = "10m"
    sft: SftSection = Field(default_factory=SftSection)
    rft: RftSection = Field(default_factory=RftSection)

    @field_validator("checkpoint_every", mode="before")
    @classmethod
    def _steps_or_time(cls, value: Any) -> Any:
        steps = isinstance(value, int) and not isinstance(value, bool) and value > 0
        if steps or (isinstance(value, str) and re.fullmatch(r"never|[1-9]\d*[smh]", value)):
            return value
        raise PydanticCustomError(
            "checkpoint_every", "is neither a number of steps nor a time (90s, 10m, 2h) nor `never`"
        )

    @property
    def phases(self) -> tuple[Phase, ...]:
        """What a stage does one after the other."""
        phases: dict[Paradigm, tuple[Phase, ...]] = {"sft": ("sft",), "rft": ("rft",), "sft+rft": ("sft", "rft")}
        return phases[self.paradigm]

    def identity(self) -> dict[str, Any]:
        """What a stage depends on: neither the other paradigm's section nor where rollouts are made."""
        section = self.model_dump(exclude={"sft", "rft"}.difference(self.phases) | WITHOUT_EFFECT)
        if "rft" in section:
            rollout = section["rft"]["rollout"]
            section["rft"]["rollout"] = {key: rollout[key] for key in rollout if key not in HARDWARE}
        return section

    def args(self, phase: Phase) -> dict[str, Any]:
        """TRL's arguments of a phase."""
        return self.sft.args if phase == "sft" else self.rft.args

    def batch_size(self, phase: Phase) -> int:
        """The global batch of a phase: samples, or completions."""
        return (self.rft.global_batch_size if phase == "rft" else None) or self.global_batch_size


def _kind_of_entry(entry: Any) -> str:
    if isinstance(entry, str):
        return "<name>"
    return "<mix>" if isinstance(entry, list) else "<task>"


_Single = Annotated[Annotated[TaskConfig, Tag("<task>")] | Annotated[str, Tag("<name>")], Discriminator(_kind_of_entry)]
_Entry = Annotated[
    Annotated[TaskConfig, Tag("<task>")]
    | Annotated[str, Tag("<name>")]
    | Annotated[list[_Single], Field(min_length=1), Tag("<mix>")],
    Discriminator(_kind_of_entry),
]


@dataclass(frozen=True)
class Stage:
    """One tuning step, resolved: `train` is the recipe's section with the overrides of the stage's tasks."""

    k: int
    name: str  # the task's name; of a mixed stage, the names joined by "+"
    tasks: list[str]
    train: TrainConfig
    visitors: tuple[str, ...] = ()  # other tasks of which some samples are trained here (`blur`)
    seed: int = 0  # the recipe's

    @property
    def folder(self) -> str:
        """The stage's folder below `RUN/stages/`."""
        return f"{self.k:02d}-{self.name}"

    @property
    def half_folder(self) -> str:
        """Beside it, what the first of two phases leaves for the second, which removes it."""
        return f".{self.folder}.{self.train.phases[0]}"


class Recipe(Config):
    """A whole recipe.

    `stream` lists the stages. An entry is a task (a mapping), the name of a task defined earlier (it re-occurs), or a
    list of those (they are mixed in one stage): `[{name: digits, …}, {name: counting, …}, [digits, counting]]`.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    seed: int = 0
    base_model: ModelConfig
    data: str | None = None  # the folder, or hub:owner/name[@revision], that the paths of a packaged stream are in
    stream: list[_Entry] = Field(min_length=1)
    recur: RecurConfig | None = None  # the stages are drawn from the stream, under the seed
    anchors: list[AnchorConfig] = Field(default_factory=list)  # general samples, of methods that keep general data
    blur: float = Field(default=0.0, ge=0, lt=1)  # the share of each task's samples that other stages train
    prepare: PrepareConfig = Field(default_factory=PrepareConfig)
    method: dict[str, dict[str, Any]] = Field(default_factory=dict)  # empty: sequential tuning
    train: TrainConfig = Field(default_factory=TrainConfig)
    eval: EvalConfig = Field(default_factory=EvalConfig)
    start_from: str | None = None  # a run, a stage's folder, or hub:owner/name@revision: row 0 in the base's place
    publish: PublishConfig | None = None  # the last step: on the Hub
    sweep: SweepConfig | None = None  # run several times, under other seeds and orders of the tasks
    folder: str = "."  # set on loading: where the recipe's own modules (`module:function`) are looked for

    @property
    def entries(self) -> list[list[TaskConfig | str]]:
        """The stream with every entry as a list: what each stage 1…K trains. Raises `InputError` if `recur` cannot."""
        if self.recur is None:
            return [entry if isinstance(entry, list) else [entry] for entry in self.stream]
        tasks: dict[str, TaskConfig | str] = {task.name: task for task in self.stream if isinstance(task, TaskConfig)}
        if len(tasks) < len(self.stream):
            raise InputError("the stream is no plain list of tasks", field="recur", remedy="List each task once")
        stages = self.recur.draw(list(tasks), self.seed)
        return [[tasks.pop(name, name) for name in names] for names in stages]  # defined where it first occurs

    @property
    def tasks(self) -> list[TaskConfig]:
        """The distinct tasks in the order of their first stage: the columns of the matrix."""
        return [task for entry in self.entries for task in entry if isinstance(task, TaskConfig)]

    @property
    def sources(self) -> list[TaskConfig]:
        """Whatever is prepared: the distinct tasks, the anchor samples, and the general tasks."""
        return [*self.tasks, *self.anchors, *self.eval.general]

    @property
    def stages(self) -> list[Stage]:
        """The tuning steps 1…K. Raises `InputError` where a task's `overrides` are not valid."""
        return [self._stage(k, entry) for k, entry in enumerate(self.entries, 1)]

    @property
    def learned(self) -> dict[str, int]:
        """The stage that first trained each task."""
        return {
            task.name: k for k, entry in enumerate(self.entries, 1) for task in entry if isinstance(task, TaskConfig)
        }

    @property
    def asd(self) -> AsdConfig | None:
        """Answer-style diversification of the training data, if the method asks for it."""
        return AsdConfig.model_validate(self.method["asd"]) if "asd" in self.method else None

    def homes(self, name: str) -> list[int]:
        """The stages that train a task as their own."""
        return [stage.k for stage in self.stages if name in stage.tasks]

    def task(self, name: str) -> TaskConfig:
        """The task called `name`."""
        return next(task for task in self.tasks if task.name == name)

    def max_length(self, name: str) -> int | None:
        """The tokens that fit in every stage that sees a task or anchor; None: only the model's context limits them."""
        anchors = [anchor.name for anchor in self.anchors]
        limits = [stage.train.max_length for stage in self.stages if name in (*stage.tasks, *stage.visitors, *anchors)]
        return min((limit for limit in limits if limit is not None), default=None)

    def _stage(self, k: int, entry: list[TaskConfig | str]) -> Stage:
        names = [task if isinstance(task, str) else task.name for task in entry]
        train = Layers(self.train.model_dump())
        for name in names:
            section = f"stream.{name}.overrides"
            for keys, value in _leaves(self.task(name).overrides):
                if keys in train.origins and train.value(keys) != value:
                    problem = f"differs from {train.origins[keys]}, and stage {k} trains both tasks"
                    raise InputError(problem, where=section, field=".".join(keys))
                train.set(keys, value, section)
        try:
            visitors = tuple(task.name for task in self.tasks if task.name not in names) if self.blur else ()
            return Stage(
                k, "+".join(names), names, TrainConfig.model_validate(train.values, strict=True), visitors, self.seed
            )
        except ValidationError as error:
            raise refusal(error, TrainConfig, train) from None


def load_recipe(
    name: str | Path,
    overrides: Iterable[str] = (),
    with_methods: Iterable[str] = (),
    *,
    check_methods: bool = True,
) -> Recipe:
    """Load, merge and validate a recipe (a path, a packaged name such as `mini/sefe`, or a run directory).

    Modules beside the recipe and in the current folder become importable. `check_methods=False` leaves the methods as
    they are written, which spares their import: for recipes that were checked before.
    Raises `InputError` with the file and the dotted key of the first thing that is wrong.
    """
    layers = read_layers(name, overrides, with_methods)
    _check_secrets(layers)
    resolve_orders(layers)
    resolve_general(layers)
    try:
        recipe = Recipe.model_validate(layers.values, strict=True)
    except ValidationError as error:
        raise refusal(error, Recipe, layers) from None
    sys.path += [folder for folder in (recipe.folder, os.getcwd()) if folder not in sys.path]
    with _located(layers.origin(("recur",))):
        _ = recipe.entries
    _check_names(recipe, layers)
    with _located(layers.origin(("stream",))):
        stages = recipe.stages  # a task's overrides are checked here, not when its stage's turn comes
    if recipe.sweep:
        with _located(layers.origin(("sweep",))):
            stages += [stage for member in members(recipe) for stage in member.recipe.stages]
    if check_methods:
        with _located(layers.origin(("method",))):
            _settle_methods(recipe, stages)
    return recipe


def _settle_methods(recipe: Recipe, stages: Iterable[Stage]) -> None:
    """Check and write out the methods, in place; anchor samples that none of them asks for are left out."""
    keeps, carriers, stages = set[str](), set[str](), list(stages)
    if recipe.method:
        from mcit.pipeline.methods import build_methods, expand  # needs torch, sequential tuning does not

        recipe.method = expand(recipe.method)
        methods = [method for stage in stages for method in build_methods(recipe.method, stage.train)]
        keeps, carriers = {m.keeps for m in methods}, {m.name for m in methods if m.carries}
    check_quantization(recipe, {stage.train.lineage for stage in stages}, carriers)
    if "general data" not in keeps:
        recipe.anchors = []
    elif not recipe.anchors:
        raise InputError(
            "a method keeps general data, and the recipe names none",
            where="recipe",
            field="anchors",
            remedy="List data sets as in a stream: anchors: [{name: general, train: general.jsonl, images: pictures/}]",
        )


def _check_secrets(layers: Layers) -> None:
    """A recipe is copied into runs and logs. Raises `InputError`, without the secret, for one that holds any."""
    for keys, value in _leaves(layers.values):
        for what, _ in shaped_secrets(str(value)):
            remedy = (
                "Secrets come from the environment (HF_TOKEN, …) or from `hf auth login`. If it was shared, revoke it"
            )
            raise InputError(f"holds {what}", where=layers.origin(keys), field=".".join(keys), remedy=remedy)


def dump_recipe(recipe: Recipe) -> dict[str, Any]:
    """The resolved recipe as plain data, every default spelt out; loading it again gives the same recipe."""
    return recipe.model_dump(mode="json")


def write_recipe(recipe: Recipe, path: Path) -> None:
    """Write the resolved recipe, atomically."""
    with atomic_open(path) as file:
        file.write(to_yaml(dump_recipe(recipe)))


@contextlib.contextmanager
def _located(where: str) -> Iterator[None]:
    """Put the file's name before an `InputError` of someone who knows only the merged recipe."""
    try:
        yield
    except InputError as error:
        raise InputError(str(error).removeprefix("recipe: "), where=where) from None


def _check_names(recipe: Recipe, layers: Layers) -> None:
    """Every task is defined once, before its name is used, and trained at most once in a stage; what is not in the
    stream has other names."""
    where, defined = layers.origin(("stream",)), set[str]()
    for index, entry in enumerate(recipe.entries):
        names = [task if isinstance(task, str) else task.name for task in entry]
        for task, name in zip(entry, names, strict=True):
            if isinstance(task, str) and name not in defined:
                raise InputError(
                    f"no earlier task is called {name}",
                    where=where,
                    field=f"stream.{index}",
                    remedy=nearest(name, defined),
                )
            if isinstance(task, TaskConfig) and name in defined:
                raise InputError(
                    f"the task {name} is defined twice",
                    where=where,
                    field=f"stream.{index}",
                    remedy="Write only its name where it re-occurs",
                )
            if isinstance(task, TaskConfig) and task.train is None:
                raise InputError("is missing", where=where, field=f"stream.{name}.train")
            if names.count(name) > 1:
                raise InputError(f"{name} stands twice in one stage", where=where, field=f"stream.{index}")
            defined.add(name)
    for section, tasks in (("anchors", recipe.anchors), ("eval.general", recipe.eval.general)):
        for task in tasks:
            if task.name in defined:
                problem, keys = f"the name {task.name} is taken", section.split(".")
                raise InputError(problem, where=layers.origin(keys), field=f"{section}.{task.name}")
            defined.add(task.name)


def _leaves(mapping: dict[str, Any], at: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """The dotted keys of a nested mapping with their values."""
    for key, value in mapping.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, (*at, key))
        else:
            yield (*at, key), value
