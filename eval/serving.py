"""`stages/<k>/serving.json`: how the policy of a stage is served. The only thing evaluation knows of training."""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from mcit.data_prep.errors import InputError
from mcit.data_prep.files import read_json, write_json
from mcit.data_prep.schema import Config


class Serving(Config):
    """How to serve one stage's policy.

    `base`: the untouched base model as given in the recipe (a folder or a Hub id) and its `revision` and `dtype`.
    `kind`: `base` (row 0), `adapter` (a LoRA in `path`, on the untouched base), `extended` (modules of a method's own
    in `path`, on the untouched base: transformers alone serves them) or `merged` (a whole model in `path`).
    `path` is relative to the folder of `serving.json`, as is `carried`: the adapter that the next stage goes on from,
    where a method has something else evaluated (a merge, an average). `hash` is the SHA-256 of what is served (adapter
    or model files, or the base's own hash): predictions are keyed by it, and the adapter's name in vLLM comes from it.
    """

    stage: int = Field(ge=0)
    name: str  # "base", "start" (what a run goes on from, in the base's place), or the stage's task names joined by "+"
    kind: Literal["base", "adapter", "extended", "merged"]
    base: str
    revision: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    processor: dict[str, Any] = Field(default_factory=dict)  # e.g. min_pixels, max_pixels
    trust_remote_code: bool = False
    path: str | None = None
    carried: str | None = None
    rank: int | None = None
    base_hash: str
    hash: str

    @property
    def handed(self) -> str | None:
        """The adapter that the next stage goes on from; None where it is the base, or no LoRA."""
        return self.carried or (self.path if self.kind == "adapter" else None)


def write_serving(stage_dir: Path, serving: Serving) -> None:
    """Write `serving.json` into a stage's folder, atomically."""
    write_json(stage_dir / "serving.json", serving.model_dump())


def read_serving(stage_dir: Path) -> Serving:
    """Read and validate a stage's `serving.json`. Raises `InputError`."""
    path = Path(stage_dir) / "serving.json"
    try:
        return Serving.model_validate(read_json(path))
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(first["msg"], where=path, field=".".join(map(str, first["loc"]))) from None


def save_processor(processor: Any, folder: Path) -> None:
    """Write a model's processor beside it, without what tells how it was loaded.

    transformers notes in the tokenizer's file whether the Hub was out of reach (`local_files_only`), and equal policies
    would have other hashes.
    """
    processor.tokenizer.init_kwargs.pop("local_files_only", None)
    processor.save_pretrained(folder)
