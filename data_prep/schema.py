"""What a sample, a task and its preparation are. Everything downstream reads these and nothing else."""

from typing import Any, Literal, NotRequired, Self, TypedDict
from urllib.parse import urlsplit

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)
from pydantic_core import PydanticCustomError

Style = Literal["short", "yes_no", "mcq", "brief", "detailed", "number", "label", "latex", "caption", "bbox"]
Reasoning = Literal["none", "think"]


class Message(TypedDict):
    """One chat turn. The images of a sample are attached, in order, to its first user turn."""

    role: Literal["system", "user", "assistant"]
    content: str


class Sample(TypedDict):
    """One line of `RUN/data/<task>/{train,validation,test}.jsonl`: TRL's prompt/completion form and what scoring needs.

    `prompt` ends with a user turn whose text already holds the format sentence; `completion` is what the model is
    taught to say (an assistant turn; multi-turn dialogues alternate, and only assistant turns carry loss).
    `references` are the accepted answers, without any reasoning. `meta` is free; known keys: `options` (list of option
    texts of an mcq, in letter order), `question` (the question without options and format sentence), `image_id` (what
    split and clustered errors group by), `asd` (provenance of a converted sample), `gold_think` (a gold rationale).
    """

    id: str
    task: str
    images: list[str]
    prompt: list[Message]
    completion: list[Message]
    references: list[str]
    style: Style
    reasoning: Reasoning
    meta: NotRequired[dict[str, Any]]


class Config(BaseModel):
    """Base of every recipe section: unknown keys are refused, values are not silently converted from other types."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class TaskConfig(Config):
    """One task of a stream, as a recipe writes it (design: `{name: receipts, train: train.json, test: …}`)."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    # hub:owner/name[@revision], which the paths below are in. A folder given here is part of them once a recipe is read
    data: str | None = None
    # a file (.json, .jsonl, .parquet), several (data/train-*.parquet), or module:function, a reader; None: a task that
    # is only ever evaluated
    train: str | None = None
    test: str | float | None = (
        None  # a file, a reader, or the share of images to split off. None: a train reader's own test part, else 0.1
    )
    validation: str | None = None
    images: str | None = None  # the folder (or .zip) image paths are relative to; default: the data file's folder
    answers: str | None = None  # a file with the accepted answers of the test part, where its own file has none
    layout: str | None = None  # of mcit.data_prep.layouts, or module:function; None: told by the fields of a row
    style: Style | None = None  # inferred from the answers if missing
    reasoning: Reasoning = "none"
    scorer: str | None = (
        None  # a kind, a protocol (coin:imagenet) or module:function; inferred from the style if missing
    )
    reward: str = "same"  # RFT: "same" as the scorer, or module:function
    format: str | None = None  # the format sentence to append to every question, if the data have none
    overrides: dict[str, Any] = Field(default_factory=dict)  # of `train:`, for stages that train this task


class AnchorConfig(TaskConfig):
    """General samples (`anchors:` of a recipe), given like a task: methods see all of them, and none is ever scored."""

    train: str
    test: Literal[0] = 0


class LimitConfig(Config):
    """Caps on the number of samples a task; the subset depends on the data alone, never on the run's seed."""

    train: int | None = Field(default=None, gt=0)
    test: int | None = Field(default=None, gt=0)


class PrepareConfig(Config):
    """The `prepare:` section of a recipe."""

    limit: LimitConfig = Field(default_factory=LimitConfig)
    on_bad: Literal["error", "drop"] = "error"


class EndpointConfig(Config):
    """A model behind an OpenAI-compatible endpoint, and how it is asked (`mcit.data_prep.endpoint`)."""

    endpoint: str | None = None  # OpenAI-compatible, up to /v1: http://localhost:8000/v1
    model: str | None = None  # as the endpoint calls it
    api_key_env: str = "OPENAI_API_KEY"  # the environment variable that holds the key; the key is written nowhere
    concurrency: int = Field(default=16, gt=0)  # questions asked at once
    timeout: float = Field(default=120, gt=0)  # seconds until a question is asked again
    retries: int = Field(default=6, ge=0)  # of a question that met a timeout, too many requests or a server's fault
    request: dict[str, Any] = Field(default_factory=dict)  # other parameters of the request: {temperature: 0.7, …}

    @model_validator(mode="after")
    def _check_address(self) -> Self:
        parts = urlsplit(self.endpoint or "")
        if self.endpoint and (parts.scheme not in ("http", "https") or not parts.netloc or "@" in parts.netloc):
            problem = "`endpoint` is an address such as http://localhost:8000/v1, without a key"
            raise PydanticCustomError("endpoint", problem)
        return self

    def identity(self) -> dict[str, Any]:
        """What the answers depend on; where the model is served and how fast it is asked is no part of it."""
        return self.model_dump(exclude={"endpoint", "api_key_env", "concurrency", "timeout", "retries"})


class AsdConfig(EndpointConfig):
    """Answer-style diversification (SEFE, arXiv 2505.02486): `method: {asd: {…}}` of a recipe.

    What an endpoint needs is for the converter `llm` alone.
    """

    fraction: float = Field(default=0.2, ge=0, le=1)  # 20 %: SEFE's best (page)
    converter: Literal["rules", "llm"] = "rules"

    @model_validator(mode="after")
    def _check_converter(self) -> "AsdConfig":
        for key in ("endpoint", "model"):
            if (getattr(self, key) is not None) != (self.converter == "llm"):
                problem = "needs `{key}`" if self.converter == "llm" else "takes no `{key}`"
                raise PydanticCustomError("asd", f"the converter {self.converter} {problem}", {"key": key})
        return self

    @model_serializer(mode="wrap")
    def _only_what_acts(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        shown = serialize(self)
        return {key: shown[key] for key in shown if self.converter == "llm" or key in ("fraction", "converter")}


class PreparedTask(TypedDict):
    """`RUN/data/<task>/task.json`: what the rest of the pipeline knows of a task. Written last, so it marks the end."""

    name: str
    style: Style
    reasoning: Reasoning
    scorer: str
    reward: str
    image_root: str  # "." when the images lie in this folder; sample image paths are relative to it
    choices: NotRequired[list[str] | None]  # the short answers or labels, where they are a closed set
    counts: dict[str, int]  # samples per part: train, validation, test
    notes: list[str]  # what was inferred, split off or dropped, to be printed
    hash: str  # of the samples and the images' bytes: the data's identity in every fingerprint
    train_hash: str  # of the training part alone: what a stage depends on
    test_hash: str  # of the test part alone: what a score depends on
