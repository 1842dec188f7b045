"""What TRL's trainers get beyond their own: the methods' loss terms, and alarms."""

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import TrainerCallback

from .arguments import deepspeed, processes
from .methods import Method, StepView
from .zero3 import gather

if TYPE_CHECKING:
    from transformers import Trainer


class MethodLoss:
    """Adds the methods' terms to the loss of a TRL trainer, by the contract of `Method.loss`.

    `idle` are the trained parameters that a batch may leave out of the graph (`idle_parameters`). They get a gradient
    of zero then, as they would in any larger batch: data parallel would otherwise fail.
    """

    methods: Sequence[Method] = ()
    idle: Sequence[nn.Parameter] = ()

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The trainer's own loss plus the terms; `return_outputs` is not supported with methods (TRL deprecates it)."""
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)  # type: ignore[misc]
        if not self.model.training:  # type: ignore[attr-defined]
            return loss
        gather(self.idle)
        for parameter in self.idle:
            loss = loss + 0 * parameter.sum()
        micro_batches = self.current_gradient_accumulation_steps  # type: ignore[attr-defined]
        view = StepView(
            model=self.accelerator.unwrap_model(self.model),  # type: ignore[attr-defined]
            inputs=inputs,
            step=self.state.global_step,  # type: ignore[attr-defined]
            micro_batches=micro_batches,
            share=self.share(inputs),
            last=self.accelerator.sync_gradients,  # type: ignore[attr-defined]
            process=self.accelerator.process_index,  # type: ignore[attr-defined]
            processes=self.accelerator.num_processes,  # type: ignore[attr-defined]
        )
        # transformers' Trainer.training_step divides what it gets by the accumulation under exactly this condition.
        accepts = self.model_accepts_loss_kwargs and num_items_in_batch is not None  # type: ignore[attr-defined]
        divided = not accepts and self.compute_loss_func is None  # type: ignore[attr-defined]
        for method in self.methods:
            term = method.loss(view)
            if term is not None:
                self._terms[method.name].append(term.detach())
                loss = loss + term * (micro_batches if divided else 1)
        return loss

    def share(self, inputs: Any) -> float:
        """See `StepView.share`; where all micro-batches are equally large."""
        return 1 / self.current_gradient_accumulation_steps  # type: ignore[attr-defined]

    @property
    def _terms(self) -> dict[str, list[Tensor]]:
        return self.__dict__.setdefault("_method_terms", defaultdict(list))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log each term, per optimizer step and averaged over processes, beside the trainer's own figures."""
        steps = self.state.global_step - self.__dict__.get("_logged_step", 0)  # type: ignore[attr-defined]
        for name, terms in self._terms.items():
            term = self.accelerator.reduce(torch.stack(terms).sum(), "mean")  # type: ignore[attr-defined]
            logs[f"{name}_loss"] = term.item() / max(steps, 1)
        self._terms.clear()
        self.__dict__["_logged_step"] = self.state.global_step  # type: ignore[attr-defined]
        super().log(logs, start_time)  # type: ignore[misc]


class FiniteLoss(TrainerCallback):
    """Stops a training whose loss is no longer a number."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not math.isfinite((logs or {}).get("loss", 0.0)):
            raise RuntimeError(f"the loss is {logs['loss']} at step {state.global_step}: lower the learning rate")


class ReallyDistributed(TrainerCallback):
    """Refuses silent fall-backs: DeepSpeed to data parallel (under `use_cpu: true`), that to processes on their own."""

    def __init__(self, trainer: "Trainer"):
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        wanted = "DeepSpeedEngine" if deepspeed() else "DistributedDataParallel"
        wrapped = type(self.trainer.model_wrapped).__name__
        if (processes() > 1 or deepspeed()) and wrapped != wanted:
            raise RuntimeError(f"the model runs as {wrapped}, not as {wanted}: check the accelerate configuration")


class Untrained(TrainerCallback):
    """The model's fingerprint as training begins (DeepSpeed has rounded what it trains by then)."""

    def __init__(self, model: nn.Module):
        self.model, self.fingerprint = model, dict[str, float]()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.fingerprint = fingerprint(self.model)


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """What a stage trains, by name; whole under ZeRO-3 too, for which all processes call this together."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    gather(trained.values())
    return trained


def idle_parameters(model: PeftModel | nn.Module) -> list[nn.Parameter]:
    """Those that a batch may leave out: LoRA on projector and vision tower; of a method's experts, any."""
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else None
    inside = set(base.get_decoder().parameters()) if base else set()
    return [parameter for parameter in trained_parameters(model).values() if parameter not in inside]


def fingerprint(model: nn.Module) -> dict[str, float]:
    """A number for each trained parameter that changes when the parameter does."""
    return {
        name: parameter.detach().double().square().sum().item() for name, parameter in trained_parameters(model).items()
    }
