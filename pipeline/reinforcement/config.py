"""The `train.rft:` section of a recipe."""

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from mcit.data_prep.readers import is_function
from mcit.data_prep.schema import Config

from .presets import laid_under

BUILT_IN = ("accuracy", "format")


class RifConfig(Config):
    """`train.rft.rif:`. Before a stage, its samples are tried by the policy that enters it, and some are left out.

    `competent` keeps what at least one answer gets right, `variance` what at least one gets right and one wrong: two
    readings of the paper (arXiv 2507.05386), whose filter was not seen.
    """

    rollouts: int = Field(default=8, ge=2)  # K: second-hand
    keep: Literal["competent", "variance"] = "competent"
    threshold: float = Field(default=0.5, ge=0, lt=1)  # an answer whose accuracy is above it is right: ours


class RolloutConfig(Config):
    """`train.rft.rollout:`. What answers while a stage trains; which hardware it runs on is no part of a stage."""

    engine: Literal["transformers", "vllm", "server"] = "transformers"
    resample: int = Field(default=0, ge=0)  # times that the answers to a prompt are drawn again if all earn the same
    # The largest mean gap, in nats a token, between what the engine and the trainer say of the same answers.
    tolerance: float = Field(default=0.05, gt=0)
    memory: float = Field(default=0.3, gt=0, lt=1)  # of `vllm`: its share of the GPU
    sleep: bool = False  # of `vllm`: whether it gives that share back while the trainer works
    url: str | None = None  # of `server`: up to /v1. None: where MCIT_ROLLOUT_URL says, as in SLURM jobs
    adapters: str | None = None  # of `server`: a folder that it sees under the same path. None: in the run's

    @model_validator(mode="after")
    def _address(self) -> "RolloutConfig":
        for key in ("url", "adapters"):
            if getattr(self, key) is not None and self.engine != "server":
                raise PydanticCustomError("rollout", f"the engine {self.engine} takes no `{{key}}`", {"key": key})
        return self


HARDWARE = {"memory", "sleep", "url", "adapters"}  # of RolloutConfig


class GuardConfig(Config):
    """`train.rft.guard:`. When a policy counts as collapsed, judged by means over `window` rows of the log: ours."""

    window: int = Field(default=8, gt=0)
    format: float | None = Field(default=0.5, gt=0, lt=1)  # the rate of right forms is below this share of its best
    kl: float | None = Field(default=5.0, gt=0)  # KL to the previous policy is above this, in nats a token
    entropy: float | None = Field(default=5.0, gt=0)  # entropy is above this, in nats a token


class RftSection(Config):
    """`train.rft:`. `args` go to `trl.GRPOConfig`, except for what the pipeline owns (batch size, output).

    `rewards` weighs `accuracy` (the score of the task's own scorer), `format`, and functions of the user's own.
    """

    preset: Literal["ctbench", "rft7"] | None = None  # a paper's settings, under those given here
    # rloo: advantages against the mean of the other answers to a prompt, not divided by their deviation
    algorithm: Literal["grpo", "rloo"] = "grpo"
    global_batch_size: int | None = Field(default=None, gt=0)  # completions; None: train.global_batch_size
    args: dict[str, Any] = Field(default_factory=dict)
    rewards: dict[str, float] = Field(default={"accuracy": 0.9, "format": 0.1})
    rif: RifConfig | None = None  # None: every sample is trained on
    rollout: RolloutConfig = Field(default_factory=RolloutConfig)
    guard: GuardConfig | None = Field(default_factory=GuardConfig)

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, section: Any) -> Any:
        return laid_under(section)

    @field_validator("rewards")
    @classmethod
    def _known(cls, rewards: dict[str, float]) -> dict[str, float]:
        for name in rewards:
            if name not in BUILT_IN and not is_function(name):
                raise PydanticCustomError(
                    "rewards", "`{name}` is neither accuracy, format nor module:function", {"name": name}
                )
        return rewards
