"""What a method is: one short class with a few hooks, the same for SFT and GRPO, one process and many."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from mcit.data_prep import schema
from mcit.data_prep.schema import Sample

from ..planning.outlook import Passes

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor
    from transformers import PreTrainedModel, TrainerCallback

    from mcit.eval.lora import Adapter, Dense, Factors

    from ..planning.outlook import Outlook
    from ..recipe.schema import Stage
    from ..stage.entering import Entered
    from ..training.collator import Collator
    from ..training.replay import Replay, Replayed
    from ..training.trainer import MethodLoss

Distributed = Literal["single", "ddp", "zero2", "zero3"]
Past = Mapping[int, Sequence[Sample]]  # samples by the stage that trained them last


@dataclass(frozen=True)
class StepView:
    """What `Method.loss` sees of one micro-batch; it hides which trainer runs it."""

    model: "PeftModel"  # unwrapped; the adapter in training is `default`
    inputs: Mapping[str, Any]  # the micro-batch, as the trainer prepared it; the last rows may be replayed samples
    replayed: int  # how many of them are
    step: int  # optimizer steps done so far in this stage
    micro_batches: int  # of this optimizer step, on this process
    share: float  # samples of this micro-batch over those of the global batch, times the number of processes
    last: bool  # whether this is the last of them
    process: int  # which of `processes` this one is
    processes: int
    hidden: "Tensor | None" = None  # last hidden states [rows, length, units], for methods that ask by `needs_hidden`


class Method:
    """Base of all methods. Class attributes say what it is and where it works; a recipe that asks for more is refused.

    A recipe's `method: {<name>: {…}}` is validated by `Config`. `neutral` holds the settings under which the method
    does nothing: then training must equal sequential tuning under the same lineage bit for bit, and draw no random
    number. State is a flat mapping of tensors, saved after each stage and handed to the next one. Between steps the
    model may also run in evaluation mode (`eval.during`): hooks on its modules look at `training`.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    category: ClassVar[str]  # bound, regularisation, replay, distillation, data, architecture, merging, schedule
    keeps: ClassVar[Literal["nothing", "general data", "past data"]]
    cost: ClassVar[str]  # in a few words: beside sequential tuning, of time, memory and disk
    lineages: ClassVar[Sequence[str]] = ("stack", "fold", "continue", "independent")
    paradigms: ClassVar[Sequence[str]] = ("sft", "rft")
    distributed: ClassVar[Sequence[Distributed]] = ("single", "ddp", "zero2", "zero3")
    conflicts: ClassVar[Sequence[str]] = ()
    Config: ClassVar[type[schema.Config]] = schema.Config
    neutral: ClassVar[Mapping[str, Any]] = {}
    carried_as: ClassVar[Literal["merged", "extended"]] = "merged"  # what `leave` writes (`mcit.eval.serving`)
    needs_lora: ClassVar[bool] = False  # whether it acts on LoRA, and not beside a method that carries the policy
    packs: ClassVar[bool] = True  # whether several samples may be in a row: not where a module looks at whole rows
    needs_hidden: ClassVar[bool] = False  # whether `loss` looks at `StepView.hidden`, which supervised tuning has

    def __init__(self, config: schema.Config):
        self.config = config

    @property
    def carries(self) -> bool:
        """Whether what the method trains holds the policy, in the place of a LoRA: then it has `enter` and `leave`."""
        return False

    def enter(self, model: "PreTrainedModel", state: dict[str, "Tensor"], collator: "Collator") -> "PreTrainedModel":
        """The entering policy with what trains in it, made of the untouched base; it comes before `build`."""
        raise NotImplementedError

    def leave(self, model: "PreTrainedModel", processor: Any, folder: Path) -> None:
        """Write the policy to `folder`, as what `carried_as` says, after `finish`; `model` is not used afterwards."""
        raise NotImplementedError

    def build(self, model: "PeftModel", state: dict[str, "Tensor"]) -> None:
        """Prepare for a stage: `state` is what `finish` returned after the stage before (empty in the first)."""

    def data(self, stage: "Stage", samples: list[Sample], past: Past, state: dict[str, "Tensor"]) -> list[Sample]:
        """The samples to train on; image paths are absolute.

        `past` has, by stage, what earlier stages trained and this one does not; empty unless the method keeps past
        data. `state` is that of `build`.
        """
        return samples

    def loss(self, view: StepView) -> "Tensor | None":
        """A term to add to the loss of this micro-batch, a scalar, or None.

        Terms are summed over the micro-batches of an optimizer step and averaged over processes. So a term that depends
        on the weights alone is returned once, where `view.last`; a mean over the micro-batch's samples, those that are
        not replayed, is multiplied by `view.share` (micro-batches need not be equally large). What counts then depends
        neither on the accumulation split nor on the number of processes. A term may be shared out, as a sum of which
        each process returns its own part times `view.processes`; one that has none returns a zero, so that all log the
        same terms.
        """
        return None

    def replay(self, kept: list[Sample]) -> "Replay | None":
        """The samples to see in every global batch beside the stage's own, which are neither fewer nor dealt otherwise.

        `kept` is what the method keeps: of general data, the recipe's anchor samples. Image paths are absolute. Past
        data come by `data`, as `past`.
        """
        return None

    def begin(self, entered: "Entered", trainer: "MethodLoss") -> None:
        """Look at the entering policy, on its devices, before the first step; all processes join in.

        `trainer.look` runs models over the samples of `replay`.
        """

    def replay_loss(self, seen: "Replayed") -> "Tensor":
        """The loss of each replayed sample, [n]; what counts is its mean over the replayed samples of a global batch.

        So a sample's loss must not depend on what else is in `seen`, nor then does training on how batches are split.
        """
        raise NotImplementedError

    def disk(self, outlook: "Outlook") -> int:
        """Bytes of what is left of a stage because of the method: its state, and what is evaluated by `served`."""
        return 0

    def memory(self, outlook: "Outlook") -> float:
        """Bytes that the method holds beside the model on the device of one process while a stage trains."""
        return 0

    def trains(self, outlook: "Outlook") -> int | None:
        """The parameters in training, where they are not `outlook.trained`; None: they are."""
        return None

    def passes(self, outlook: "Outlook") -> Passes:
        """What there is to do for the method beside training; replayed samples are counted anyway."""
        return Passes()

    def callbacks(self) -> list["TrainerCallback"]:
        """Callbacks for what acts per step."""
        return []

    def state_dict(self) -> dict[str, Any]:
        """What has changed in the method itself since `begin`, for a checkpoint: plain data and tensors.

        Weights in training, random numbers and the place in the data are in there anyway.
        """
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint; it comes after `begin`, which sees the entering policy all the same."""

    def finish(self, model: "PeftModel", samples: list[Sample]) -> dict[str, "Tensor"]:
        """The state for the next stage, on the CPU; `model` is trained, still with its adapter `default`."""
        return {}

    def hand_over(self) -> dict[str, "Tensor"]:
        """The state for a stage's second phase, on the CPU; empty: the one that the stage entered with."""
        return {}

    def served(self, policy: "Adapter", state: Mapping[str, "Tensor"]) -> "Mapping[str, Factors | Dense] | None":
        """What is evaluated in place of `policy`, which the next stage goes on from; None: the policy itself.

        Both are changes of the untouched base, by layer; `state` is what `finish` returned. The first process asks.
        """
        return None
