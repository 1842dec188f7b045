"""What TRL's trainers get beyond their own: the methods' loss terms, the samples that methods replay, and alarms."""

import contextlib
import copy
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from mcit.data_prep.errors import InputError

from ..methods import Method, StepView
from ..stage.resume import Resumable
from .arguments import deepspeed, processes
from .batches import deal, same_images
from .collator import REPLAYED, REPLAYED_LABELS, Collator
from .packing import PACKING, pack
from .parameters import evaluating, fingerprint, trained_parameters
from .replay import Pass, Replayed, Replays, backbone, caught_states, unwrapped
from .zero3 import gather, whole

if TYPE_CHECKING:
    from transformers import Trainer

    from ..recipe.schema import Stage
    from ..stage.entering import Entered


class MethodLoss(Resumable):
    """Adds the methods' terms to the loss of a TRL trainer, by the contract of `Method.loss` and `Method.replay_loss`.

    `idle` are the trained parameters that a batch may leave out of the graph (`idle_parameters`). They get a gradient
    of zero then, as they would in any larger batch: data parallel would otherwise fail.
    `replays` are the samples that methods see beside the stage's own, and `collator` makes batches of them alone.
    """

    methods: Sequence[Method] = ()
    idle: Sequence[nn.Parameter] = ()
    replays = Replays([], {})
    collator: Collator
    coming: Sequence[
        Any
    ] = ()  # this process's micro-batches of the optimizer step that begins, as the collator made them

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        """The trainer's own, remembered for methods that look at a step's samples before it is taken."""
        self.coming, items = super().get_batch_samples(*args, **kwargs)
        return list(self.coming), items

    def take_on(self, entered: "Entered", methods: Sequence[Method], idle: Sequence[nn.Parameter]) -> None:
        """Work with a stage's methods from here on."""
        self.methods, self.idle, self.replays = methods, idle, entered.replays
        self.collator = Collator(entered.processor, [], entered.max_length)
        self.stateful.update({f"method.{method.name}": method for method in methods})
        self.add_callback(Begin(entered, self))
        if entered.stage.train.packing:
            self.add_callback(PackedAlike(self))

    def report(self) -> dict[str, Any]:
        """What a stage says of its training beside the log, for `trained.json`."""
        return {}

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The trainer's own loss plus the terms; `return_outputs` is not supported with methods (TRL deprecates it)."""
        beside, labels = inputs.pop(REPLAYED, []), inputs.pop(REPLAYED_LABELS, None)
        watch: contextlib.AbstractContextManager[list[Tensor]] = contextlib.nullcontext([])
        asked = any(method.needs_hidden for method in self.methods)
        if beside or asked:
            watch = caught_states(self.model)
        with watch as states:
            loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if not self.model.training:
            return loss
        gather(self.idle)
        for parameter in self.idle:
            loss = loss + 0 * parameter.sum()
        micro_batches = self.current_gradient_accumulation_steps
        view = StepView(
            model=self.model,
            inputs=inputs,
            replayed=len(beside),
            step=self.state.global_step,
            micro_batches=micro_batches,
            share=self.share(inputs),
            last=self.accelerator.sync_gradients,
            process=self.accelerator.process_index,
            processes=self.accelerator.num_processes,
            hidden=states[0] if asked else None,
        )
        seen = [Pass.inside(beside, states[0], labels)] if beside else self.apart(view)
        # transformers' Trainer.training_step divides what it gets by the accumulation under exactly this condition.
        accepts = self.model_accepts_loss_kwargs and num_items_in_batch is not None
        divided = not accepts and self.compute_loss_func is None
        for method, term in [*self._own_terms(view), *self._replay_terms(seen)]:
            self._terms[method.name].append(term.detach())
            loss = loss + term * (micro_batches if divided else 1)
        return loss

    def share(self, inputs: Any) -> float:
        """See `StepView.share`; where all micro-batches are equally large."""
        return 1 / self.current_gradient_accumulation_steps

    def apart(self, view: StepView) -> Iterable[Pass]:
        """Forward passes over replayed samples that were not in the micro-batch itself."""
        return ()

    @torch.no_grad()
    def look(self, model: nn.Module, method: Method) -> Iterator[Replayed]:
        """All samples of `method.replay` once through `model`, in evaluation mode: this process's part of them.

        All processes must go through to the end, for they make as many passes, at the same time.
        """
        for one in self.look_at(model, self.replays.drawn[method.name].indices):
            yield from (seen for _, seen in self.replays.by_method(one))

    @torch.no_grad()
    def look_at(self, model: nn.Module, indices: Sequence[int]) -> Iterator[Pass]:
        """As `look`, samples of the stage by index: its own come first, as `finish` gets them."""
        with evaluating(model):
            yield from (one for one in self.passes(model, indices) if one.counts)

    def gradients(self, indices: Sequence[int], of: Callable[[Tensor, Tensor], Tensor]) -> Iterator[dict[str, Tensor]]:
        """The gradient of `of` for each sample by itself, with respect to what trains, by name, in evaluation mode.

        `of` makes a scalar of a sample's last hidden states [tokens, units] and labels [tokens]. This process's part of
        the samples, under the same condition as `look`; an optimizer's own gradients are left alone.
        """
        trained = trained_parameters(self.model)
        with evaluating(self.model, gradients=True), torch.enable_grad():
            for one in self.passes(self.model, indices, alone=True):
                value = of(one.hidden[0, : one.tokens[0]], one.labels[0, : one.tokens[0]])
                found = torch.autograd.grad(value, list(trained.values()), allow_unused=True, materialize_grads=True)
                if one.counts:
                    yield dict(zip(trained, found, strict=True))

    @torch.no_grad()
    def output_head(self, method: str) -> nn.Linear:
        """What makes logits of last hidden states, tried on a sample of the stage for `method`.

        Raises `InputError` where logits are more than that, scaled or capped: a loss on them would be another model's.
        """
        model = self.model
        head = whole(unwrapped(model).get_output_embeddings())
        inputs = self._prepare_input(self.collator.collate([self.replays.samples[0]]))
        del inputs["labels"]
        with evaluating(model), caught_states(model) as states, self.accelerator.autocast():
            wanted = model(**inputs, use_cache=False).logits
            found = head(states[0])
        if not torch.allclose(found.to(wanted.dtype), wanted, rtol=0.02, atol=0.02 * wanted.abs().max().item()):
            problem = f"the logits of {type(unwrapped(model)).__name__} are not its output layer's"
            raise InputError(problem, where="recipe", field=f"method.{method}")
        return head

    def passes(self, model: nn.Module, indices: Sequence[int], alone: bool = False) -> Iterator[Pass]:
        """Samples, by index, through `model`: `alone`, or as many as a micro-batch has at a time."""
        accelerator, replays = self.accelerator, self.replays
        size = (1 if alone else self.args.per_device_train_batch_size) * accelerator.num_processes
        for step in deal(indices, replays.has_images, size, accelerator.num_processes):
            mine = step[accelerator.process_index]
            batch = self.collator.collate([replays.samples[index] for index in mine.samples])
            tokens = batch["attention_mask"].sum(1).tolist()
            inputs = self._prepare_input(batch)
            labels = inputs.pop("labels")
            with accelerator.autocast():
                hidden = backbone(model)(**inputs, use_cache=False).last_hidden_state
            yield Pass(mine.samples, tokens, hidden, labels, mine.loss)

    def _own_terms(self, view: StepView) -> Iterator[tuple[Method, Tensor]]:
        for method in self.methods:
            if (term := method.loss(view)) is not None:
                yield method, term

    def _replay_terms(self, passes: Iterable[Pass]) -> Iterator[tuple[Method, Tensor]]:
        """A term of each method that replays: a zero where there is nothing to see, so that all log the same terms."""
        drawn = {name for name, drawn in self.replays.drawn.items() if drawn.per_batch}
        methods = {method.name: method for method in self.methods if method.name in drawn}
        terms = {name: torch.zeros((), device=self.args.device) for name in methods}
        for one in passes:
            for name, seen in self.replays.by_method(one):
                share = one.counts * self.accelerator.num_processes / self.replays.drawn[name].per_batch
                terms[name] = terms[name] + share * methods[name].replay_loss(seen).sum()
        return ((method, terms[name]) for name, method in methods.items())

    @property
    def _terms(self) -> dict[str, list[Tensor]]:
        return self.__dict__.setdefault("_method_terms", defaultdict(list))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log each term, per optimizer step and averaged over processes, beside the trainer's own figures."""
        steps = self.state.global_step - self.__dict__.get("_logged_step", 0)
        for name, terms in self._terms.items():
            term = self.accelerator.reduce(torch.stack(terms).sum(), "mean")
            logs[f"{name}_loss"] = term.item() / max(steps, 1)
        self._terms.clear()
        self.__dict__["_logged_step"] = self.state.global_step
        super().log(logs, start_time)


class Begin(TrainerCallback):
    """Lets the methods look at the entering policy once the trainer has placed it."""

    def __init__(self, entered: "Entered", trainer: MethodLoss):
        self.entered, self.trainer = entered, trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for method in self.trainer.methods:
            method.begin(self.entered, self.trainer)


_ENDLESS = 10**9  # the hidden size of a decoder that nothing matters to but the number of tokens
LOWER = "Lower the learning rate, or clip gradients (max_grad_norm)"


class FiniteLoss(TrainerCallback):
    """Refuses to train on once the loss is no longer a number. What was trained before stays."""

    def __init__(self, stage: "Stage"):
        self.where, self.field = f"stage {stage.name}", f"train.{stage.train.paradigm}.args"

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not math.isfinite(loss := (logs or {}).get("loss", 0.0)):
            problem = f"the loss is {loss} at step {state.global_step}"
            raise InputError(problem, where=self.where, field=self.field, remedy=LOWER)


class ReallyDistributed(TrainerCallback):
    """Refuses silent fall-backs: DeepSpeed to data parallel (under `use_cpu: true`), that to processes on their own."""

    def __init__(self, trainer: "Trainer"):
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        wanted = "DeepSpeedEngine" if deepspeed() else "DistributedDataParallel"
        wrapped = type(self.trainer.model_wrapped).__name__
        if (processes() > 1 or deepspeed()) and wrapped != wanted:
            raise RuntimeError(f"the model runs as {wrapped}, not as {wanted}: check the accelerate configuration")


class PackedAlike(TrainerCallback):
    """Refuses to pack rows for a model to which they are then something else than by themselves."""

    def __init__(self, trainer: MethodLoss):
        self.trainer = trainer

    @torch.no_grad()
    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer, samples = self.trainer, self.trainer.replays.samples
        model, first = trainer.model, samples[0]
        other = next(one for one in reversed(samples) if bool(one["images"]) == bool(first["images"]))
        rows = [first, other, {**first, "completion": other["completion"]}]
        collator = copy.copy(trainer.collator)
        collator.max_length = _ENDLESS  # of a row that is made for this, and no sample
        batch = collator.collate(rows)
        del batch["labels"]
        packing = pack(batch["input_ids"], batch["attention_mask"], same_images(rows), width=_ENDLESS)
        inputs = trainer._prepare_input(batch)
        with evaluating(model), trainer.accelerator.autocast():
            apart, packed = (
                backbone(model)(**inputs, **more, use_cache=False).last_hidden_state[inputs["attention_mask"].bool()]
                for more in ({}, {PACKING: packing})
            )
        if not torch.allclose(apart, packed, rtol=0.02, atol=0.02 * apart.abs().max().item()):
            problem = f"does not work for {type(unwrapped(model)).__name__}: its rows know of each other"
            raise InputError(problem, where="recipe", field="train.packing", remedy="Leave it out")


class Untrained(TrainerCallback):
    """The model's fingerprint as training begins (DeepSpeed has rounded what it trains by then)."""

    def __init__(self, model: nn.Module):
        self.model, self.fingerprint = model, dict[str, float]()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.fingerprint = fingerprint(self.model)
