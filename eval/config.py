"""The `eval:` section of a recipe."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from mcit.data_prep.errors import InputError
from mcit.data_prep.readers import is_function
from mcit.data_prep.schema import Config, EndpointConfig, TaskConfig

from .judge.prompts import Instructions
from .judge.rubrics import check_rubric


class DuringConfig(Config):
    """`eval.during:`: what is asked while a stage trains. Which steps: `mcit.pipeline.stage.during.due_steps`."""

    dense: int = Field(default=50, ge=0)  # as many first steps of each stage are followed by an evaluation …
    growth: float = Field(default=1.3, ge=1)  # … then they come at gaps that grow by this factor
    probes: int = Field(default=64, gt=0)  # test samples asked of each task


class RemoteConfig(EndpointConfig):
    """`eval.remote:`, the vLLM server that `engine: remote` asks. Where it is and how fast changes no answer.

    `model` is what it calls the base; default: the first model that it lists.
    """

    concurrency: int = Field(default=64, gt=0)  # questions under way at once
    timeout: float = Field(default=600, gt=0)  # seconds until a question is asked again
    retries: int = Field(default=4, ge=0)  # of a question that met a timeout, an overload or a server's fault
    parity: bool = True  # compare log-probs with transformers here; without, an adapter is shown to act, no more

    @model_validator(mode="after")
    def _check_remote(self) -> "RemoteConfig":
        if self.endpoint is None:
            raise PydanticCustomError("remote", "needs `endpoint`")
        if self.request:
            raise PydanticCustomError("remote", "takes no `request`: answers are greedy, as in the other engines")
        return self


class JudgeConfig(EndpointConfig):
    """`eval.judge:` of a model that reads reasoning; see docs/judging.md."""

    rubrics: dict[str, str] = Field(default_factory=dict)  # task → a field's name, or what counts, in a sentence
    instructions: Instructions = "full"  # brief: for a judge that was tuned on such prompts
    samples: int | None = Field(default=None, gt=0)  # of each cell, the same at every stage; default: all
    attempts: int = Field(default=3, gt=0)  # how often it is asked until its reply is a verdict

    @model_validator(mode="after")
    def _check_judge(self) -> "JudgeConfig":
        for key in ("endpoint", "model"):
            if getattr(self, key) is None:
                raise PydanticCustomError("judge", "needs `{key}`", {"key": key})
        for rubric in self.rubrics.values():
            try:
                check_rubric(rubric)
            except InputError as error:
                raise PydanticCustomError("judge", "{error}", {"error": str(error)}) from None
        return self


def _program(name: str) -> str:
    if not is_function(name):
        problem = "is no module:function; a model is a mapping {endpoint: …, model: …}"
        raise PydanticCustomError("judge", problem)
    return name


def _kind_of_judge(value: Any) -> str:
    return "<program>" if isinstance(value, str) else "<model>"


Judge = Annotated[
    Annotated[JudgeConfig, Tag("<model>")] | Annotated[str, AfterValidator(_program), Tag("<program>")],
    Discriminator(_kind_of_judge),
]


class EvalConfig(Config):
    """How policies are scored. Generation is greedy."""

    # auto: vLLM where it runs, else transformers, and says so
    engine: Literal["auto", "vllm", "transformers", "remote"] = "auto"
    remote: RemoteConfig | None = None  # of the engine `remote`
    cells: Literal["metrics", "full", "seen", "last"] = "metrics"
    # Every question a second time, the answer held to the form that is asked for: what superficial and essential
    # forgetting are told apart by.
    constrained: bool = True
    # Tasks that are never trained, asked at every stage. In a recipe, the name of a probe stands for its task.
    general: list[TaskConfig] = Field(default_factory=list)
    image_probe: int | None = Field(default=None, gt=0)  # samples of each task that are asked without their images
    max_new_tokens: int = Field(default=512, gt=0)
    max_model_len: int | None = Field(default=None, gt=0)  # default: what the model's configuration allows
    batch_size: int = Field(default=32, gt=0)  # of the transformers engine; vLLM batches by itself
    probes: int = Field(default=8, gt=0)  # prompts on which each adapter is shown to be live before scores count
    # Largest |log-prob gap| between transformers and vLLM, in nats: of any probe token in float32; in 16 bits, where
    # single improbable tokens differ by tenths in correct code, the mean over all probe tokens.
    parity_tolerance: float = Field(default=0.05, gt=0)
    during: DuringConfig | None = None  # None: nothing is asked while a stage trains
    judge: Judge | None = None  # of reasoning: a model, or a program that checks it, as module:function

    @model_validator(mode="after")
    def _check_remote(self) -> "EvalConfig":
        if self.engine == "remote" and self.remote is None:
            raise PydanticCustomError("remote", "the engine `remote` needs an address: `remote.endpoint`")
        return self
