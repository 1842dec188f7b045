"""The `eval:` section of a recipe."""

from typing import Literal

from pydantic import Field

from mcit.data_prep.schema import Config


class EvalConfig(Config):
    """How policies are scored. Generation is greedy."""

    engine: Literal["auto", "vllm", "transformers"] = (
        "auto"  # auto: vLLM where it runs, else transformers, and says so
    )
    cells: Literal["metrics", "full", "seen", "last"] = "metrics"
    max_new_tokens: int = Field(default=512, gt=0)
    max_model_len: int | None = Field(default=None, gt=0)  # default: what the model's configuration allows
    batch_size: int = Field(default=32, gt=0)  # of the transformers engine; vLLM batches by itself
    probes: int = Field(default=8, gt=0)  # prompts on which each adapter is shown to be live before scores count
    parity_tolerance: float = Field(
        default=0.05, gt=0
    )  # largest |log-prob gap| between transformers and vLLM, in nats
