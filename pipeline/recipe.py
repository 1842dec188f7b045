"""The recipe: one schema, validated before anything starts."""

from typing import Any, Literal

from pydantic import Field

from mcit.data_prep.schema import Config, PrepareConfig, TaskConfig
from mcit.eval.config import EvalConfig

Lineage = Literal["continue", "stack", "fold", "independent"]
Reference = Literal["base", "previous", "none"]


class ModelConfig(Config):
    """`base_model:`. `path` is a folder (relative to the recipe's file) or a Hub id."""

    path: str
    revision: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    processor: dict[str, Any] = Field(default_factory=dict)  # e.g. {min_pixels: …, max_pixels: …}
    trust_remote_code: bool = False


class ModulesConfig(Config):
    """What is trained: LoRA on the language model's linear layers; projector and vision tower frozen, or with LoRA."""

    language: Literal["lora"] = "lora"
    projector: Literal["frozen", "lora"] = "frozen"
    vision: Literal["frozen", "lora"] = "frozen"


class LoraSection(Config):
    """`train.lora:`. Defaults are SEFE's, CoIN LLaVA-1.5-7B (code)."""

    r: int = Field(default=128, gt=0)
    alpha: float = Field(default=256, gt=0)
    dropout: float = Field(default=0.05, ge=0, lt=1)


class SftSection(Config):
    """`train.sft:`. `args` go to `trl.SFTConfig` unchanged, except for what the pipeline owns (batch size, output)."""

    args: dict[str, Any] = Field(default_factory=dict)


class RftSection(Config):
    """`train.rft:`. `args` go to `trl.GRPOConfig`; `rewards` weighs the scorer's accuracy and the format."""

    args: dict[str, Any] = Field(default_factory=dict)
    rewards: dict[Literal["accuracy", "format"], float] = Field(
        default_factory=lambda: {"accuracy": 0.9, "format": 0.1}
    )


class TrainConfig(Config):
    """`train:`."""

    paradigm: Literal["sft", "rft"] = "sft"
    lineage: Lineage = "stack"
    reference: Reference = "previous"
    modules: ModulesConfig = Field(default_factory=ModulesConfig)
    lora: LoraSection = Field(default_factory=LoraSection)
    global_batch_size: int = Field(default=128, gt=0)
    max_length: int | None = Field(
        default=None, gt=0
    )  # tokens of a sample, images included; default: the model's context
    sft: SftSection = Field(default_factory=SftSection)
    rft: RftSection = Field(default_factory=RftSection)


class Recipe(Config):
    """A whole recipe. `stream` lists stages: a task, the name of an earlier task (it re-occurs), or a list of them (a mix)."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    seed: int = 0
    base_model: ModelConfig
    stream: list[TaskConfig]
    prepare: PrepareConfig = Field(default_factory=PrepareConfig)
    method: dict[str, dict[str, Any]] = Field(default_factory=dict)  # empty: sequential tuning
    train: TrainConfig = Field(default_factory=TrainConfig)
    eval: EvalConfig = Field(default_factory=EvalConfig)
