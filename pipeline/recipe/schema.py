"""The recipe: one schema. `layers.py` reads and merges its files, `loading.py` validates it before anything starts."""

import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, ValidationError, field_validator
from pydantic_core import PydanticCustomError

from mcit.data_prep.errors import InputError
from mcit.data_prep.schema import AnchorConfig, AsdConfig, Config, PrepareConfig, TaskConfig
from mcit.eval.config import EvalConfig
from mcit.pipeline.publishing.config import PublishConfig
from mcit.pipeline.recipe.layers import Layers, leaves
from mcit.pipeline.recipe.orders import SweepConfig
from mcit.pipeline.recipe.refusals import refusal
from mcit.pipeline.recipe.schedule import RecurConfig
from mcit.pipeline.reinforcement.config import HARDWARE, RftSection

Lineage = Literal["continue", "stack", "fold", "independent", "full"]
Reference = Literal["base", "previous", "none"]
Paradigm = Literal["sft", "rft", "sft+rft"]
Phase = Literal["sft", "rft"]
# Of `train:`, what changes how long a training takes and not what comes of it,
# or only the order of summation, as another launch does.
WITHOUT_EFFECT = {"checkpoint_every", "picture_cache", "attention"}
# The same of TRL's arguments. In RFT the micro-batch may be what a loss is a mean over, and the guard reads the log.
_ARGS_WITHOUT_EFFECT = {
    *("gradient_checkpointing", "gradient_checkpointing_kwargs", "report_to", "run_name", "disable_tqdm"),
    *("dataloader_num_workers", "dataloader_prefetch_factor", "dataloader_pin_memory", "log_level"),
    *("dataloader_persistent_workers", "log_level_replica", "torch_empty_cache_steps"),
}
_SFT_ARGS_WITHOUT_EFFECT = _ARGS_WITHOUT_EFFECT | {"per_device_train_batch_size", "logging_steps"}


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

    language: Literal["frozen", "lora", "full"] = "lora"
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
    # How attention is computed; default: what transformers takes for the model, `sdpa` as a rule.
    attention: Literal["sdpa", "eager", "flex_attention", "flash_attention_2", "flash_attention_3"] | None = None
    # GiB of each process's main memory for what a frozen tower makes of pictures, so that none is encoded twice.
    picture_cache: float = Field(default=0.0, ge=0)
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

    @property
    def asks_server(self) -> bool:
        """Whether answers to learn from come from a vLLM server."""
        return "rft" in self.phases and self.rft.rollout.engine == "server"

    @property
    def needs_server(self) -> bool:
        """Whether one has to be started for it: the recipe names none."""
        return self.asks_server and self.rft.rollout.url is None

    def identity(self) -> dict[str, Any]:
        """What a stage depends on: neither the other paradigm's section nor where rollouts are made."""
        section = self.model_dump(exclude={"sft", "rft"}.difference(self.phases) | WITHOUT_EFFECT)
        for phase in self.phases:
            spared = _SFT_ARGS_WITHOUT_EFFECT if phase == "sft" else _ARGS_WITHOUT_EFFECT
            args = section[phase]["args"]
            section[phase]["args"] = {name: args[name] for name in args if name not in spared}
        if "rft" not in section:
            del section["reference"]
        else:
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
            for keys, value in leaves(self.task(name).overrides):
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
