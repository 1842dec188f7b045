"""FPF and k-FPF (arXiv 2304.04158): the layers that move most are tuned again on past samples, the others left alone.

`times: 1` does so once, at the end of the stage (FPF); with more it is done that often, evenly over the stage, the
last time at its end (k-FPF). Each time, the layers that have moved most since the stage began (mean |θ − θ_start|),
until they make up `share` of what trains, take `steps` steps of AdamW on past samples, at `learning_rate`,
`per_batch` at once. Of the paper's two losses this is the one on labels; no official code was found. `times: 0` is
neutral, and so is a first stage, which has no past.
"""

from collections import defaultdict
from typing import TYPE_CHECKING, Any

import torch
from pydantic import Field
from torch import Tensor
from transformers import TrainerCallback

from mcit.data_prep import schema

from ..planning.outlook import FLOAT, Outlook, Passes
from ..training.batches import Drawn
from ..training.parameters import evaluating, trained_parameters
from ..training.replay import Replay
from .base import Method, Past
from .buffer import even_buffer
from .hft import matrix
from .outputs import answer_loss

if TYPE_CHECKING:
    from ..recipe.schema import Stage
    from ..stage.entering import Entered
    from ..training.trainer import MethodLoss


class FpfConfig(schema.Config):
    """`method: {fpf: {…}}`. The paper's values are not known to us; these are ours."""

    times: int = Field(default=1, ge=0)  # k
    steps: int = Field(default=20, gt=0)  # M, each time
    share: float = Field(default=0.2, gt=0, le=1)  # of the trained weights
    buffer: int = Field(default=500, gt=0)  # samples of all past stages together
    per_batch: int = Field(default=8, gt=0)
    learning_rate: float = Field(default=1e-4, gt=0)


class Fpf(Method):
    """Forgetting-prioritised fine-tuning."""

    name = "fpf"
    paper = "FPF, ICML 2023, arXiv 2304.04158"
    category = "schedule"
    keeps = "past data"
    cost = "`times` x `steps` more steps a stage; a copy of what trains"
    lineages = ("stack", "fold", "continue", "full")
    distributed = ("single", "ddp")  # DeepSpeed steps from weights of its own, which this would not move
    conflicts = ("replay", "der", "ilora")
    Config = FpfConfig
    neutral = {"times": 0}  # noqa: RUF012

    config: FpfConfig

    def data(
        self, stage: "Stage", samples: list[schema.Sample], past: Past, state: dict[str, Tensor]
    ) -> list[schema.Sample]:
        self.taken = 0  # steps on past samples
        self.kept = even_buffer(past, self.config.buffer, stage.seed)
        return samples

    def replay(self, kept: list[schema.Sample]) -> Replay | None:
        return Replay(self.kept, 0) if self.kept and self.config.times else None  # in no batch of the stage's own

    def begin(self, entered: "Entered", trainer: "MethodLoss") -> None:
        if not (self.kept and self.config.times):
            return
        self.trainer, self.seed = trainer, entered.seed
        self.head = trainer.output_head(self.name)
        self.drawn = Drawn(trainer.replays.drawn[self.name].indices, self.config.per_batch)
        self.start = {name: weight.detach().clone() for name, weight in trained_parameters(trainer.model).items()}

    def callbacks(self) -> list[TrainerCallback]:
        return [_Revise(self)] if self.kept and self.config.times else []

    def state_dict(self) -> dict[str, Any]:
        return {"taken": self.taken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.taken = state["taken"]

    def revise(self) -> None:
        """Tune what has moved most on past samples."""
        trained = trained_parameters(self.trainer.model)
        chosen = [trained[name] for name in most_moved(trained, self.start, self.config.share)]
        optimizer = torch.optim.AdamW(chosen, lr=self.config.learning_rate, weight_decay=0)
        for _ in range(self.config.steps):
            for weight, gradient in zip(chosen, self._gradients(chosen), strict=True):
                weight.grad = gradient
            optimizer.step()
            optimizer.zero_grad()

    def memory(self, outlook: Outlook) -> float:
        """What trains as it was; gradients and moments of what is chosen, while no others are there."""
        if not (self.config.times and outlook.stages > 1):
            return 0
        return FLOAT * outlook.trained * (1 + 2 * self.config.share)

    def passes(self, outlook: Outlook) -> Passes:
        steps = self.config.times * self.config.steps if outlook.stages > 1 else 0
        return Passes(gradients=steps * self.config.per_batch * outlook.length)

    def _gradients(self, weights: list[Any]) -> list[Tensor]:
        """Of the mean cross-entropy of the next `per_batch` past samples."""
        trainer, indices = self.trainer, self.drawn.of(self.taken, self.seed)
        self.taken += 1
        total = [torch.zeros_like(weight) for weight in weights]
        with evaluating(trainer.model, gradients=True), torch.enable_grad():
            for one in trainer.passes(trainer.model, indices):
                rows = zip(one.hidden, one.labels, one.tokens, strict=True)
                losses = [answer_loss(h[:tokens], labels[:tokens], self.head) for h, labels, tokens in rows]
                found = torch.autograd.grad(torch.stack(losses).sum(), weights, allow_unused=True)
                for summed, gradient in zip(total, found, strict=True):
                    if one.counts and gradient is not None:
                        summed += gradient
        return [trainer.accelerator.reduce(summed, "sum") / len(indices) for summed in total]


def most_moved(weights: dict[str, Any], start: dict[str, Tensor], share: float) -> list[str]:
    """The parameters of the layers that moved most, by mean |θ − θ_start|, up to the first that fills `share`."""
    layers: dict[str, list[str]] = defaultdict(list)
    for name in weights:
        layers[matrix(name)].append(name)
    sizes = {layer: sum(weights[name].numel() for name in names) for layer, names in layers.items()}
    moved = {
        layer: sum((weights[name].detach() - start[name]).abs().sum().item() for name in names) / sizes[layer]
        for layer, names in layers.items()
    }
    chosen: list[str] = []
    left = share * sum(sizes.values())
    for layer in sorted(layers, key=lambda layer: -moved[layer]):
        if left <= 0:
            break
        chosen += layers[layer]
        left -= sizes[layer]
    return chosen


class _Revise(TrainerCallback):
    def __init__(self, method: Fpf):
        self.method = method

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        times = self.method.config.times
        if state.global_step in {round(state.max_steps * turn / times) for turn in range(1, times + 1)}:
            self.method.revise()
