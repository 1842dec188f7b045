"""TRL's `GRPOTrainer` as stages use it: an explicit reference, KL to both policies logged, and the methods' terms."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from trl import GRPOTrainer
from trl.models.utils import disable_gradient_checkpointing

from mcit.data_prep.schema import Sample

from ..methods import StepView
from ..training.batches import GroupSampler, with_images
from ..training.head import labels_alone
from ..training.replay import Pass
from ..training.trainer import MethodLoss
from .groups import kept_together, packed_groups
from .prompts import prompt_dataset
from .references import References

# What a micro-batch holds for the model beside its tokens, as TRL passes it on.
_FIELDS = (
    *("pixel_values", "image_grid_thw", "num_images", "pixel_attention_mask", "spatial_shapes", "num_tiles"),
    *("image_sizes", "token_type_ids", "mm_token_type_ids", "image_position_ids"),
)


class StageGRPOTrainer(MethodLoss, GRPOTrainer):
    """TRL's `GRPOTrainer` with the methods' terms, on generation batches that are with images or without.

    `beta` weighs the KL to the policy that `reference` names. A micro-batch's log-probabilities under base and previous
    policy are computed once, however many iterations train on it. Replayed samples are in forward passes of their own,
    in the last micro-step: TRL's batches are prompts and what was generated. With `packed`, the decoder's hidden size,
    the answers to a prompt stay together and share its row.
    """

    def __init__(
        self,
        has_images: Sequence[bool],
        references: References,
        reference: Literal["base", "previous", "none"],
        beta: float,
        leave_one_out: bool,
        tolerance: float,
        packed: int | None = None,
        **kwargs: Any,
    ):
        self.has_images, self.references, self.reference = has_images, references, reference
        self.kl_weight, self.leave_one_out, self.tolerance = beta, leave_one_out, tolerance
        self.packed = packed
        self.asked: list[Sample] = []  # of the generation batch in work, one each completion
        self.drawn_at = 0  # optimizer steps done when it was drawn
        self.notes: list[Callable[[], dict[str, Any]]] = []  # what `report` asks
        super().__init__(**kwargs)

    def _get_train_sampler(self, dataset: Any = None) -> GroupSampler:
        args: Any = self.args
        self.sampler = GroupSampler(
            self.has_images,
            prompts=args.generation_batch_size // args.num_generations,
            group=args.num_generations,
            repeats=self.num_iterations * args.steps_per_generation,
            seed=args.seed,
        )
        return self.sampler

    def between_batches(self) -> bool:
        """Whether everything that was generated has been learned from: checkpoints hold no rollouts."""
        args: Any = self.args
        return self._step % (args.steps_per_generation * self.num_iterations) == 0

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        group: Any = self.num_generations
        with kept_together(group) if self.packed else contextlib.nullcontext():
            return super()._prepare_inputs(generation_batch)

    def _get_per_token_logps_and_entropies(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        group: Any = self.num_generations
        with labels_alone():
            read = packed_groups(model, group, self.packed) if self.packed else model
            return super()._get_per_token_logps_and_entropies(read, *args, **kwargs)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        self.asked = [row["sample"] for row in inputs]  # a `rollout_func` is told the prompts alone
        self.drawn_at = self.state.global_step
        return super()._generate_and_score_completions(inputs)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """See `MethodLoss`; `inputs` stay in TRL's buffer as long as they are trained on."""
        if "base_logps" not in inputs:
            self._look_back(inputs)
        # TRL computes a reference of its own wherever this is not 0; in its loss, it takes what it is given.
        self.beta = self.kl_weight
        try:
            with _caught_log_probs(cast(nn.Module, self.model)) as caught:
                loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        finally:
            self.beta = 0.0
        self._log_divergences(caught[0], inputs)
        return loss

    @torch.no_grad()
    def _look_back(self, inputs: dict[str, Any]) -> None:
        """Add what a micro-batch's tokens are worth under both references."""
        tokens = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        fields = {name: inputs.get(name) for name in _FIELDS}
        trained: Any = self.model
        checkpointing: Any = self.args.gradient_checkpointing_kwargs
        with disable_gradient_checkpointing(trained, checkpointing):
            for name in self.references.names:
                with self.references.under(name) as model:
                    logps, *_ = self._get_per_token_logps_and_entropies(
                        model, tokens, mask, inputs["completion_ids"].shape[1], **fields
                    )
                inputs[f"{name}_logps"] = logps
        inputs.setdefault("previous_logps", inputs["base_logps"])
        if self.kl_weight:
            inputs["ref_per_token_logps"] = inputs[f"{self.reference}_logps"]
        if self.leave_one_out:  # r − mean of the others = (r − mean of all) · G / (G − 1)
            group: Any = self.num_generations
            inputs["advantages"] = inputs["advantages"] * group / (group - 1)

    @torch.no_grad()
    def _log_divergences(self, log_probs: Tensor, inputs: Mapping[str, Any]) -> None:
        """Per token of the answers: KL to both references, and how far the rollouts' engine is from the trainer."""
        mask = inputs["completion_mask"].float()
        policy = log_probs[:, -mask.shape[1] :]
        for name in ("base", "previous"):
            self._log_mean(f"kl_{name}", k3(policy, inputs[f"{name}_logps"]), mask)
        sampled = inputs.get("sampling_per_token_logps")
        if sampled is None or self.state.global_step != self.drawn_at:
            return  # else the policy is still the one that was sampled from
        gap = self._log_mean("rollout_gap", (policy - sampled).abs(), mask)
        if gap > self.tolerance:
            raise RuntimeError(
                f"rollouts come from another policy than is trained: their log-probabilities differ by {gap:.3g} nats "
                f"a token, more than train.rft.rollout.tolerance ({self.tolerance:g})"
            )

    def _log_mean(self, name: str, values: Tensor, mask: Tensor) -> float:
        """The mean of `values` over the tokens of all processes, which TRL is to log."""
        totals = self.accelerator.reduce(torch.stack([(values * mask).sum(), mask.sum()]), "sum")
        mean: float = (totals[0] / totals[1].clamp(min=1)).item()
        self._metrics["train"][name].append(mean)
        return mean

    def keep(self, samples: Sequence[Sample]) -> None:
        """Train on `samples` in the place of those that the trainer was made with."""
        self.has_images, self.train_dataset = with_images(samples), prompt_dataset(samples)

    def report(self) -> dict[str, Any]:
        """See `MethodLoss.report`."""
        cut = [row["completions/clipped_ratio"] for row in self.state.log_history if "completions/clipped_ratio" in row]
        report: dict[str, Any] = {"cut_off": round(sum(cut) / len(cut), 4) if cut else None}
        for note in self.notes:
            report |= note()
        return report

    def apart(self, view: StepView) -> Iterator[Pass]:
        """The replayed samples of this optimizer step."""
        if view.last and self.replays.drawn:
            yield from self.passes(view.model, self.replays.of(view.step, self.args.seed))


def k3(policy: Tensor, reference: Tensor) -> Tensor:
    """An estimate of KL(policy ‖ reference) for each token drawn from the policy: `exp(d) − d − 1`, `d` the log-ratio.

    Never negative, and unbiased (J. Schulman, Approximating KL divergence, 2020).
    """
    ratio = reference - policy
    return ratio.exp() - ratio - 1


@contextlib.contextmanager
def _caught_log_probs(model: nn.Module) -> Iterator[list[Tensor]]:
    """The log-probabilities [rows, tokens − 1] of every pass of `model` inside, as TRL's fused head computes them."""
    caught: list[Tensor] = []
    hook = model.register_forward_hook(lambda module, args, output: caught.append(output.log_probs.detach()))
    try:
        yield caught
    finally:
        hook.remove()
