"""The two policies that KL is measured to, under every lineage: the untouched base, and the one training begins with.

TRL holds one reference, and which one it is depends on how its model came about. Here both are at hand, and TRL, which
is told that there is no KL while it generates, makes none of its own.
"""

import contextlib
from collections.abc import Iterator
from typing import Any, Literal

from peft import PeftModel
from trl.trainer.utils import add_fused_lm_head, use_adapter

from mcit.data_prep.errors import InputError

from ..policy.adapters import concat, live_adapter, lora_layers, negate
from ..policy.lineage import add_frozen, by_part, load_past, without_past
from ..stage.entering import Entered
from ..training.packing import read_packed
from ..training.replay import unwrapped

Name = Literal["base", "previous"]
UNDO, COPY = "undo", "previous"  # names of frozen adapters


class References:
    """Gives the model that a reference's log-probabilities come from.

    Of a LoRA it is the model in training, the previous policy with its adapters disabled (or, where they were trained
    before, with a frozen copy of them), and the base with what the lineage had put beside or into its weights taken out
    again. Under `full` both are models of their own, frozen, in the dtype that policies are served in.
    """

    def __init__(self, entered: Entered):
        self.entered, self.model = entered, entered.model
        self.whole: dict[Name, Any] = {}
        if not isinstance(self.model, PeftModel):
            self.alike = entered.enters_base
            return
        if list(self.model.peft_config) != ["default"]:
            found = ", ".join(self.model.peft_config)
            raise RuntimeError(f"a stage trains one adapter, `default`, and the model has {found}")
        past, lineage = load_past(entered.previous, entered.stage.train), entered.stage.train.lineage
        parts = by_part(unwrapped(self.model), past)
        if entered.stage.train.picture_cache and (parts["vision"] or parts["projector"]):
            problem = "an earlier stage has trained the tower, and the base sees pictures otherwise"
            raise InputError(problem, where="recipe", field="train.picture_cache", remedy="Leave it out")
        if lineage == "fold" and past:
            add_frozen(self.model, concat([negate(past)]), UNDO)
        trained_before = any(bool(b.any()) for _, _, b, _ in lora_layers(self.model))
        if trained_before:
            add_frozen(self.model, concat([live_adapter(self.model)]), COPY)
        self.alike = not (past or trained_before)

    @property
    def names(self) -> list[Name]:
        """Those whose log-probabilities are to be computed: where training begins with the base they are one."""
        return ["base"] if self.alike else ["base", "previous"]

    def load(self, trainer: Any) -> None:
        """Put models of their own, if there are any, on the devices of `trainer`; all processes call it together."""
        if isinstance(self.model, PeftModel):
            return
        for name in self.names:
            load = self.entered.load_base if name == "base" else self.entered.load_entering
            self.whole[name] = load(trainer.accelerator).requires_grad_(False)
            if self.entered.stage.train.packing:
                read_packed(self.whole[name])
            add_fused_lm_head(
                self.whole[name],
                temperature=trainer.temperature,
                cast_lm_head_to_fp32=trainer.args.cast_lm_head_to_fp32,
            )

    @contextlib.contextmanager
    def under(self, name: Name) -> Iterator[Any]:
        """The model, as it is inside the block."""
        if self.whole:
            yield self.whole[name]
            return
        adapter = {"base": UNDO, "previous": COPY}[name]
        past = without_past(self.model) if name == "base" else contextlib.nullcontext()
        there = adapter if adapter in self.model.peft_config else None
        with past, _trains_as_before(self.model), use_adapter(self.model, there):
            yield self.model


@contextlib.contextmanager
def _trains_as_before(model: PeftModel) -> Iterator[None]:
    """PEFT has all of an adapter train that is put back in place, also what a method has frozen of it."""
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
