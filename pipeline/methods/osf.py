"""OSF, orthogonal subspace fine-tuning (arXiv 2504.07097, sec. 3), by PEFT's own tuner.

As a stage begins, each adapted layer's weight is decomposed, W = U Σ Vᵀ. The directions with the `preserved` share of
the largest singular values are frozen, and gradients of the others are projected off them. After the stage the change
is added to the weight, and the next one decomposes the sum. The paper chooses the share layer by layer and lets it
grow from stage to stage; PEFT's tuner has one for all. Policies are of any rank, so each is a merged model.
`preserved: 1` is neutral: then LoRA trains.
"""

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from peft import OSFConfig, get_peft_model
from peft.tuners.osf.layer import OSFLayer
from pydantic import Field
from torch import Tensor

from mcit.data_prep import schema
from mcit.eval.lora import Dense, fold
from mcit.eval.serving import save_processor

from ..planning.outlook import FLOAT, Outlook
from ..policy.adapters import pattern
from ..policy.lineage import target_names
from .base import Method, Past

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..recipe.schema import Stage
    from ..training.collator import Collator


class OsfConfig(schema.Config):
    """`method: {osf: {…}}`. Which layers are adapted is `train.modules`' matter, as with LoRA."""

    preserved: float = Field(default=0.5, gt=0, le=1)  # of each weight's singular directions: PEFT's default


class Osf(Method):
    """State: what all stages together have changed, [out, in] float32 by layer."""

    name = "osf"
    paper = "OSF, arXiv 2504.07097; PEFT"
    category = "architecture"
    keeps = "nothing"
    cost = "a decomposition of every adapted weight a stage; twice its size on disk, and a merged model"
    lineages = ("fold",)
    paradigms = ("sft",)
    distributed = ("single", "ddp")
    conflicts = ("hft",)
    Config = OsfConfig
    neutral: ClassVar[dict[str, Any]] = {"preserved": 1}

    config: OsfConfig

    @property
    def carries(self) -> bool:
        return self.config.preserved < 1

    def data(
        self, stage: "Stage", samples: list[schema.Sample], past: Past, state: dict[str, Tensor]
    ) -> list[schema.Sample]:
        self.train = stage.train
        return samples

    def enter(self, model: "PreTrainedModel", state: dict[str, Tensor], collator: "Collator") -> Any:
        self.loaded = copy.deepcopy((model.config, model.generation_config))  # trainers write into them
        self.past = state
        fold(model, {name: Dense(change) for name, change in state.items()})
        targets = pattern(target_names(model, self.train.modules))
        return get_peft_model(model, OSFConfig(effective_rank=self.config.preserved, target_modules=targets))

    def trains(self, outlook: Outlook) -> int | None:
        if not self.carries:
            return None
        return sum((rows + columns + 1) * self._free(rows, columns) for rows, columns in outlook.shapes.values())

    def memory(self, outlook: Outlook) -> float:
        """What trains as it was, and the frozen directions of the longer side."""
        if not self.carries:
            return 0
        frozen = sum(
            max(rows, columns) * (min(rows, columns) - self._free(rows, columns)) * (rows != columns)
            for rows, columns in outlook.shapes.values()
        )
        return outlook.model.dtype.itemsize * ((self.trains(outlook) or 0) + frozen)

    def disk(self, outlook: Outlook) -> int:
        """A merged model, and the change of every layer."""
        changes = FLOAT * sum(rows * columns for rows, columns in outlook.shapes.values())
        return outlook.base_bytes + changes if self.carries else 0

    def _free(self, rows: int, columns: int) -> int:
        """Of a weight's directions, how many train; PEFT rounds the others down."""
        return min(rows, columns) - int(self.config.preserved * min(rows, columns))

    @torch.no_grad()
    def finish(self, model: Any, samples: list[schema.Sample]) -> dict[str, Tensor]:
        if not self.carries:
            return {}
        changes = {
            name: layer.get_delta_weight("default").float().cpu()
            for name, layer in model.get_base_model().named_modules()
            if isinstance(layer, OSFLayer)
        }
        return {name: change + self.past[name] if self.past else change for name, change in changes.items()}

    def leave(self, model: Any, processor: Any, folder: Path) -> None:
        merged = model.merge_and_unload()
        merged.config, merged.generation_config = self.loaded
        merged.save_pretrained(folder)
        save_processor(processor, folder)
