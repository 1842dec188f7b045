"""Merging by task vectors (arXiv 2212.04089): what each stage's policy adds to the base, combined weight by weight.

A method says how. What is merged is evaluated; the next stage goes on from the policy itself, under `continue`,
`stack` and `fold` (the sequential tuning of MagMaX), or from the base, under `independent` (as merging is mostly
done). A layer's merged change is of full rank: a LoRA holds it where the layer has at most 512 rows or columns, a
merged model elsewhere. State: each stage's own adapter, as factors.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field
from torch import Tensor

from mcit.data_prep import schema
from mcit.eval.engines.settings import MAX_RANK
from mcit.eval.lora import Adapter, Dense, Factors

from ..planning.outlook import FLOAT, Outlook
from ..policy.adapters import concat, live_adapter
from .base import Method, Past

if TYPE_CHECKING:
    from peft import PeftModel

    from ..recipe.schema import Stage


class VectorsConfig(schema.Config):
    """What merges have in common."""

    merge: bool = True  # false: the policy itself is evaluated
    scale: float = Field(default=1.0, ge=0)  # lambda: of the merged vector as it is added to the base


class Vectors(Method):
    """Nothing acts while a stage trains. `merge` is what a method is about."""

    category = "merging"
    keeps = "nothing"
    cost = "every stage's adapter on disk, and a merge after each; training is that of sequential tuning"
    needs_lora = True
    neutral: ClassVar[dict[str, Any]] = {"merge": False}

    config: VectorsConfig

    def merge(self, layer: str, vectors: list[Tensor]) -> Tensor:
        """A layer's merged change, of those of all stages so far, [out, in] each."""
        raise NotImplementedError

    def data(
        self, stage: "Stage", samples: list[schema.Sample], past: Past, state: dict[str, Tensor]
    ) -> list[schema.Sample]:
        self.stage, self.state = stage, state
        return samples

    def finish(self, model: "PeftModel", samples: list[schema.Sample]) -> dict[str, Tensor]:
        if not self.config.merge:
            return {}
        return self.state | flat(live_adapter(model), len(adapters(self.state)) + 1)  # a run may go on from another's

    def disk(self, outlook: Outlook) -> int:
        """The adapters of all stages, and their merge: a LoRA where one holds it, else a model."""
        if not self.config.merge:
            return 0
        summed = outlook.stage.train.lineage in ("stack", "fold")
        ranks = outlook.rank if summed else outlook.stages * outlook.stage.train.lora.r
        return FLOAT * ranks * outlook.width + self.merged_bytes(outlook)

    def merged_bytes(self, outlook: Outlook) -> int:
        """What is evaluated."""
        full = max(min(shape) for shape in outlook.shapes.values())
        if full > MAX_RANK:
            return outlook.base_bytes
        return FLOAT * full * outlook.width

    def served(self, policy: Adapter, state: Mapping[str, Tensor]) -> Mapping[str, Factors | Dense] | None:
        if not self.config.merge:
            return None
        vectors = adapters(state)
        if self.stage.train.lineage in ("stack", "fold"):  # there a stage's adapter is only what it added
            vectors = [concat(vectors[: count + 1]) for count in range(len(vectors))]
        return {
            name: Dense(self.config.scale * self.merge(name, [vector[name].delta() for vector in vectors]))
            for name in vectors[-1]
        }


def flat(adapter: Adapter, k: int) -> dict[str, Tensor]:
    """An adapter as tensors with names, those of the `k`-th one; its scaling goes into B."""
    named: dict[str, Tensor] = {}
    for name, (a, b, scaling) in adapter.items():
        named |= {f"{k:03d}.{name}.a": a, f"{k:03d}.{name}.b": b * scaling}
    return named


def adapters(state: Mapping[str, Tensor]) -> list[Adapter]:
    """The adapters of all stages, in order."""
    found: dict[str, Adapter] = {}
    for key in sorted(state):
        stage, _, rest = key.partition(".")
        name, _, part = rest.rpartition(".")
        if part == "a":
            found.setdefault(stage, {})[name] = Factors(state[key], state[f"{stage}.{name}.b"], 1.0)
    return [found[stage] for stage in sorted(found)]
