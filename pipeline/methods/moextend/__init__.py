"""MoExtend (arXiv 2408.03511): each task gets experts of its own, beside those of a mixture, and only they are trained.

Every layer gets `experts` of them: copies of the experts that the task's tokens go to most, with their router rows. All
that is old is frozen, and a token that goes to no new expert is computed as before. docs/methods.md says what differs
from the paper.
"""

import copy
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from accelerate.utils import gather_object
from pydantic import Field, field_validator
from torch import Tensor
from transformers import TrainerCallback

from mcit.data_prep import schema

from ...planning.outlook import Outlook, Passes
from ..base import Method, Past
from .experts import Added, append, copies, count, extend, merge, nudged, trained
from .models import blocks_of, expert_bytes, is_upcycled, save
from .usage import least_used, most_shifted, most_used, shift, shifted_usage, usage

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ...recipe.schema import Stage
    from ...training.collator import Collator

SAMPLES, AT_ONCE = 256, 8  # of the task, by which usage is measured, and how many of them in a batch: ours


class MoExtendConfig(schema.Config):
    """`method: {moextend: {…}}`."""

    experts: int = Field(default=1, ge=0)  # K of each layer and stage. 1, beside the 8 of a Mixtral: paper
    # The layers whose new experts are trained: all, a list, or a share, found by the shift of usage (paper: half).
    layers: str | float | list[int] = "all"
    router_steps: int = Field(default=1000, gt=0)  # of tuning that a shift is measured by: MoExtend (code)

    @field_validator("layers", mode="before")
    @classmethod
    def _layers(cls, value: Any) -> Any:
        listed = isinstance(value, list) and value and all(type(layer) is int and layer >= 0 for layer in value)
        if value == "all" or listed or (type(value) is float and 0 < value < 1):
            return value
        raise ValueError("must be `all`, a share of the layers between 0 and 1, or a list of layers counted from 0")


class MoExtend(Method):
    """A task's experts, in a mixture or in a dense Qwen3-VL made one; those of past tasks stay as they are."""

    name = "moextend"
    paper = "MoExtend, ACL 2024 SRW, arXiv 2408.03511"
    category = "architecture"
    keeps = "nothing"
    cost = "grows: experts of its own a stage; a whole model on disk each"
    lineages = ("stack", "independent")
    paradigms = ("sft",)
    distributed = ("single", "ddp", "zero2")
    conflicts = ("freeze", "hft")
    Config = MoExtendConfig
    neutral: ClassVar[dict[str, Any]] = {"experts": 0}

    config: MoExtendConfig

    @property
    def carries(self) -> bool:
        return self.config.experts > 0

    def data(self, stage: "Stage", samples: list[schema.Sample], past: Past, state: Any) -> list[schema.Sample]:
        self.stage, self.samples = stage, samples
        return samples

    def enter(self, model: Any, state: dict[str, Tensor], collator: "Collator") -> Any:
        self.loaded = copy.deepcopy((model.config, model.generation_config))  # trainers write into them
        self.blocks = blocks_of(model, self.config.layers)
        self.state = state if self.stage.train.lineage == "stack" else {}
        _restore(self.blocks, self.state)
        if torch.cuda.is_available():
            model.cuda(int(os.environ.get("LOCAL_RANK", "0")))
        used, self.layers = self._usage(model, collator)
        self.sources = {
            layer: (most_used if layer in self.layers else least_used)(shares, self.config.experts)
            for layer, shares in used.items()
        }
        for layer, block in self.blocks.items():
            sources = self.sources[layer]
            if layer in self.layers:
                extend(block, nudged(copies(block, sources), block))
            else:  # all layers have equally many: checkpoints know one number
                append(block, copies(block, sources))
        self.frozen = _checksums(model)
        return model

    def callbacks(self) -> list[TrainerCallback]:
        return [_SameEverywhere(self.sources)] if self.carries else []

    def trains(self, outlook: Outlook) -> int | None:
        return self._added(outlook)[1] // outlook.model.dtype.itemsize if self.carries else None

    def disk(self, outlook: Outlook) -> int:
        """A model with the experts of all stages in every layer, and those that were trained once more."""
        return outlook.base_bytes + self._stages(outlook) * sum(self._added(outlook)) if self.carries else 0

    def memory(self, outlook: Outlook) -> float:
        """The experts of earlier stages."""
        return (self._stages(outlook) - 1) * self._added(outlook)[0]

    def passes(self, outlook: Outlook) -> Passes:
        """Over the samples by which a mixture's usage is measured; the experts of a dense model are all alike."""
        if not self.carries or is_upcycled(outlook.model):
            return Passes()
        seen = min(SAMPLES, outlook.samples) * outlook.length
        tuned = self.config.router_steps * AT_ONCE * outlook.length if isinstance(self.config.layers, float) else 0
        return Passes(forward=seen, gradients=tuned)

    def _stages(self, outlook: Outlook) -> int:
        """Those whose experts the policy has."""
        return outlook.stages if outlook.stage.train.lineage == "stack" else 1

    def _added(self, outlook: Outlook) -> tuple[int, int]:
        """Bytes of one stage's experts: in all layers, and in those where they are trained."""
        if not self.carries:
            return 0, 0
        layers = self.config.layers
        sizes = expert_bytes(outlook.model, layers)
        everywhere = sum(sizes.values())
        if isinstance(layers, float):
            trained = round(layers * everywhere)
        else:
            trained = everywhere if layers == "all" else sum(sizes[layer] for layer in layers if layer in sizes)
        return self.config.experts * everywhere, self.config.experts * trained

    def finish(self, model: Any, samples: list[schema.Sample]) -> dict[str, Tensor]:
        """What is kept of a stage: its trained experts, and of the others which ones they are copies of."""
        if not self.carries:
            return {}
        if changed := [name for name, checksum in _checksums(model).items() if self.frozen[name] != checksum]:
            raise RuntimeError(f"{len(changed)} frozen weights were changed by training, the first: {changed[0]}")
        state = dict(self.state)
        number = max((int(key.partition(".")[0]) for key in state), default=0) + 1  # a run may go on from another's
        for layer, block in self.blocks.items():
            prefix, added = f"{number:03d}.{layer:03d}", trained(block)
            if added is None:
                state[f"{prefix}.sources"] = torch.tensor(self.sources[layer])
            else:
                state |= {f"{prefix}.{name}": tensor.cpu() for name, tensor in added._asdict().items()}
        return state

    def leave(self, model: "PreTrainedModel", processor: Any, folder: Path) -> None:
        for block in self.blocks.values():
            merge(block)
        model.config, model.generation_config = self.loaded
        save(model, processor, self.blocks, folder)

    def _usage(self, model: "PreTrainedModel", collator: "Collator") -> tuple[dict[int, Tensor], list[int]]:
        """(how each layer's experts are used on the task, the layers whose new experts are to be trained)."""
        layers: Any = self.config.layers
        everywhere = list(self.blocks) if layers == "all" else layers
        if all(count(block) == 1 for block in self.blocks.values()):  # a dense model's
            return {layer: torch.ones(1) for layer in self.blocks}, everywhere
        chosen = self.samples[:: max(1, len(self.samples) // SAMPLES)][:SAMPLES]
        batches = [collator.collate(chosen[i : i + AT_ONCE]) for i in range(0, len(chosen), AT_ONCE)]
        if not isinstance(layers, float):
            return usage(model, self.blocks, batches), everywhere
        shifted = shifted_usage(model, self.blocks, batches, self.config.router_steps)
        shifts = {layer: shift(*shares) for layer, shares in shifted.items()}
        return {layer: after for layer, (_, after) in shifted.items()}, most_shifted(shifts, layers)


def _restore(blocks: dict[int, Any], state: dict[str, Tensor]) -> None:
    """Give the blocks the experts of past stages, in the order in which they came."""
    for prefix in sorted({key.rpartition(".")[0] for key in state}):
        block = blocks[int(prefix.partition(".")[2])]
        if f"{prefix}.sources" in state:
            append(block, copies(block, state[f"{prefix}.sources"].tolist()))
        else:
            append(block, Added(*(state[f"{prefix}.{name}"] for name in Added._fields)))


def _checksums(model: "PreTrainedModel") -> dict[str, int]:
    """A number for each frozen weight that any single changed bit changes."""
    bits = {2: torch.int16, 4: torch.int32}
    return {
        name: int(parameter.detach().contiguous().view(bits[parameter.element_size()]).sum(dtype=torch.int64))
        for name, parameter in model.named_parameters()
        if not parameter.requires_grad
    }


class _SameEverywhere(TrainerCallback):
    """Refuses processes that chose other sources or layers: their gradients would be averaged all the same."""

    def __init__(self, sources: dict[int, list[int]]):
        self.sources = sources

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if any(sources != self.sources for sources in gather_object([self.sources])):
            raise RuntimeError("the processes measured different usage of experts, and chose others to copy")
