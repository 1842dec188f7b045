"""Continual evaluation: while a stage trains, its policy answers a few fixed questions of every task seen so far.

Generating answers after every step would cost more than the step, so they are scored by *teacher forcing*: one forward
pass over question and gold answer. Where the likeliest next token is the gold one all along the answer, end of turn
included, greedy decoding gives exactly the gold answer, and nowhere else: up to its first deviation it has read the
very tokens that the forward pass has.
"""

import contextlib
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import TrainerCallback

from mcit.data_prep.files import write_json
from mcit.data_prep.identity import rank
from mcit.data_prep.schema import PreparedTask, Sample
from mcit.eval.config import DuringConfig
from mcit.eval.stability import FILE, Scores, StageCurves
from mcit.eval.stats import clustered_stderr, image_clusters, mean

from ..training.batches import by_kind, with_images
from ..training.collator import IGNORED, Collator

if TYPE_CHECKING:
    from transformers import Trainer

Batch = dict[str, Tensor]


def due_steps(dense: int, growth: float) -> Iterator[int]:
    """The optimizer steps of a stage after which its policy is asked: 0, 1, …, `dense`, then at gaps `growth`^1, ^2, …

    50 and 1.3: 0 to 50, then 52, 53, 56, 59, 62, 67, 73, 82, 92, 106, 124, …: 20 in the 950 steps up to 1,000. The last
    step of a stage is looked at as well.
    """
    yield from range(dense + 1)
    step, gap = float(dense), 1.0
    while True:
        gap *= growth
        step += gap
        yield math.ceil(step)


def choose_probes(samples: Sequence[Sample], count: int) -> list[Sample]:
    """`count` of a task's test samples (or all there are), the same in every stage, run and order of the data.

    A set drawn anew each time would make the minimum over many evaluations a minimum over the draws.
    """
    return sorted(samples, key=lambda sample: rank(f"probe {sample['id']}"))[:count]


class During(TrainerCallback):
    """Scores `probes` (by task, image paths absolute) after the steps that are due, each process its part of them.

    Training is the same to the bit with and without it. Must be the last callback added: others may change weights
    after a step. Processes run different numbers of forward passes, which data parallel and ZeRO-2 allow, for the
    weights are whole on each.
    """

    def __init__(
        self,
        trainer: "Trainer",
        config: DuringConfig,
        tasks: Mapping[str, PreparedTask],
        probes: Mapping[str, Sequence[Sample]],
        collator: Collator,
    ):
        self.trainer, self.config, self.collator = trainer, config, collator
        self.data = {name: task["test_hash"] for name, task in tasks.items()}
        self.samples = [sample for samples in probes.values() for sample in samples]
        self.places = {task: [i for i, one in enumerate(self.samples) if one["task"] == task] for task in probes}
        self.due = due_steps(config.dense, config.growth)
        self.next = next(self.due)
        self.batches: list[tuple[list[int], Batch]] = []  # kept: pictures cost more to prepare than to look at
        self.steps: list[int] = []
        self.tasks: dict[str, Scores] = {task: {"exact": [], "stderr": [], "logprob": []} for task in probes}
        self.seconds = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._ask_if_due(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._ask_if_due(state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.steps[-1] != state.global_step:
            self._ask(state.global_step)

    def state_dict(self) -> dict[str, Any]:
        """What has been asked so far."""
        return {"steps": self.steps, "tasks": self.tasks, "seconds": self.seconds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what had been asked before."""
        self.steps, self.tasks, self.seconds = state["steps"], state["tasks"], state["seconds"]
        while self.next <= self.steps[-1]:
            self.next = next(self.due)

    def write(self, folder: Path) -> None:
        """Write `during.json`."""
        schedule = self.config.model_dump()
        curves: StageCurves = {"schedule": schedule, "data": self.data, "steps": self.steps, "tasks": self.tasks}
        write_json(folder / FILE, curves)

    def summary(self) -> dict[str, Any]:
        """What it cost, for `trained.json`."""
        return {"evaluations": len(self.steps), "probes": len(self.samples), "seconds": round(self.seconds, 3)}

    def _ask_if_due(self, step: int) -> None:
        if step == self.next:
            self._ask(step)
            self.next = next(self.due)

    def _ask(self, step: int) -> None:
        start = time.monotonic()
        scores = self._scores().tolist()
        self.steps.append(step)
        for task, places in self.places.items():
            exact = [100 * scores[place][0] for place in places]
            logprob = sum(scores[place][1] for place in places) / sum(scores[place][2] for place in places)
            images = image_clusters((self.samples[place].get("meta") or {}).get("image_id") for place in places)
            curve = self.tasks[task]
            curve["exact"].append(mean(exact))
            curve["stderr"].append(clustered_stderr(exact, images))
            curve["logprob"].append(logprob if math.isfinite(logprob) else None)
        self.seconds += time.monotonic() - start

    def _scores(self) -> Tensor:
        """[probes, 3], on every process: see `teacher_forced`."""
        accelerator, model = self.trainer.accelerator, cast(Any, self.trainer.model)
        self.batches = self.batches or list(self._collated(model.dtype))
        scores = torch.zeros(len(self.samples), 3, device=accelerator.device)
        with undisturbed(model):
            for places, batch in self.batches:
                here = {key: value.to(accelerator.device) for key, value in batch.items()}
                scores[places] = teacher_forced(model, here)
        reduced: Tensor = accelerator.reduce(scores, reduction="sum")
        return reduced

    def _collated(self, dtype: torch.dtype) -> Iterator[tuple[list[int], Batch]]:
        """This process's part of the probes, in batches as large as training's, which are known to fit."""
        accelerator, size = self.trainer.accelerator, self.trainer.args.per_device_train_batch_size
        mine = range(accelerator.process_index, len(self.samples), accelerator.num_processes)
        for kind in by_kind(mine, with_images(self.samples)):
            for start in range(0, len(kind), size):
                places = kind[start : start + size]
                batch = self.collator.collate([self.samples[place] for place in places])
                yield places, {key: x.to(dtype) if x.is_floating_point() else x for key, x in batch.items()}


def teacher_forced(model: Any, batch: Batch) -> Tensor:
    """[rows, 3] of a batch padded on the left: whether every gold token is the likeliest, the sum of their
    log-probabilities in nats, and how many they are.

    Gold tokens are those with a label. The logits of the answers alone are computed.
    """
    labels = batch["labels"]
    first = int((labels != IGNORED).any(0).nonzero()[0])
    gold = labels[:, first:]  # [rows, places]
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    logits = model(**inputs, logits_to_keep=gold.shape[1] + 1, use_cache=False).logits[:, :-1].float()
    right = (logits.argmax(-1) == gold) | (gold == IGNORED)
    logprobs = -F.cross_entropy(logits.transpose(1, 2), gold, ignore_index=IGNORED, reduction="none")
    return torch.stack([right.all(1).float(), logprobs.sum(1), (gold != IGNORED).sum(1).float()], 1)


@contextlib.contextmanager
def undisturbed(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation without gradients; afterwards every module's mode and torch's random numbers are as they were."""
    modes = [(module, module.training) for module in model.modules()]
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices):
            yield
    finally:
        for module, training in modes:
            module.training = training
