"""A stage before it is trained: what a method is told of it, to say what it will take."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from ..recipe.schema import Recipe, Stage

FLOAT = 4  # bytes of a number in float32, in which states and adapters are


@dataclass(frozen=True)
class Outlook:
    """What is known of a stage beforehand. Counts of samples and tokens are 0 until the data have been counted."""

    stage: "Stage"
    model: Any  # the untouched base, of which there may be no more than shapes
    shapes: Mapping[str, tuple[int, int]]  # of the layers with LoRA, [out, in], by name
    rank: int  # of the policy that the stage leaves, as one LoRA on the untouched base
    stages: int  # trained by the end of this one, from the untouched base on
    processes: int = 1
    samples: int = 0  # of the stage's own
    steps: int = 0
    micro_batch: int = 0  # samples at most of one forward pass of one process
    tokens: int = 0  # that training sees in all steps, replayed samples included
    length: float = 0.0  # tokens of one of the stage's own samples, on average
    answer: float = 0.0  # of these, with loss
    general: int = 0  # general samples that there are to keep
    general_length: float = 0.0  # tokens of one of them, on average

    @property
    def width(self) -> int:
        """Numbers of a LoRA of rank 1 on all layers that get one: Σ (out + in)."""
        return sum(rows + columns for rows, columns in self.shapes.values())

    @property
    def lora(self) -> int:
        """Parameters of the LoRA of this stage."""
        return self.stage.train.lora.r * self.width

    @property
    def trained(self) -> int:
        """Weights that the stage trains at most: those of its LoRA, or under `full` the model's own."""
        if self.stage.train.lineage == "full":
            from ..policy.lineage import whole_parameters  # here: needs torch

            return sum(weight.numel() for _, weight in whole_parameters(self.model, self.stage.train.modules))
        return self.lora

    @property
    def base_bytes(self) -> int:
        """Of the base model, and so of any merged one."""
        return sum(weight.numel() * weight.element_size() for weight in self.model.parameters())

    @property
    def resumes(self) -> bool:
        """Whether the stage trains on what an earlier one has trained."""
        return self.stages > 1 and self.stage.train.lineage in ("continue", "full")


def look_ahead(stage: "Stage", model: Any, entering_rank: int, behind: int) -> Outlook:
    """A stage as it is known before any data are: it enters with a LoRA of this rank, after `behind` other stages."""
    from ..policy.lineage import target_names  # here: methods know this module, and it knows them

    layers = ((name, model.get_submodule(name)) for name in target_names(model, stage.train.modules))
    shapes = {name: (layer.out_features, layer.in_features) for name, layer in layers}
    summed = entering_rank if stage.train.lineage in ("stack", "fold") else 0
    return Outlook(stage, model, shapes, summed + stage.train.lora.r, behind + 1)


def look_through(recipe: "Recipe", model: Any, entering_rank: int, behind: int) -> Iterator[Outlook]:
    """All stages of a recipe; `entering_rank` and `behind` are what its first one begins with."""
    for stage in recipe.stages:
        yield (outlook := look_ahead(stage, model, entering_rank, behind + stage.k - 1))
        entering_rank = outlook.rank


class Passes(NamedTuple):
    """What a method does beside training, in tokens."""

    forward: float = 0.0  # that the model takes without gradients
    gradients: float = 0.0  # forward and backward
    products: float = 0.0  # of its own, in the time that so many tokens of training take
