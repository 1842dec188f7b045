"""How answers are drawn: by an engine, and again where all answers to a prompt earn the same."""

import random
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch

from mcit.data_prep.errors import InputError
from mcit.data_prep.schema import Sample

from .rewards import Rewards

Prompts = Sequence[Any]  # chats as TRL has them, pictures inside


class Drawn(NamedTuple):
    """Answers, one each prompt: tokens, and the log-probability of each under the engine's policy, if it says."""

    prompt_ids: list[list[int]]
    completion_ids: list[list[int]]
    logprobs: list[list[float]] | None


class Engine(Protocol):
    """Draws answers from the policy in training, as it is now."""

    name: str

    def draw(self, prompts: Prompts, samples: Sequence[Sample], trainer: Any) -> Drawn:
        """An answer to each prompt; `samples` are theirs. Equal ones follow each other; all are of one kind."""
        ...

    def report(self) -> dict[str, Any]:
        """What it has cost so far."""
        ...

    def close(self) -> None:
        """Give its memory back."""
        ...


class Draws:
    """Numbers the draws of each step, so that a stage that goes on from a checkpoint draws what it would have drawn."""

    def __init__(self) -> None:
        self.step, self.number = (-1, -1), 0

    def seed(self, trainer: Any, place: object) -> int:
        """Of the answers at `place` in the draw at hand, 31 bits."""
        return random.Random(f"{trainer.args.seed} {self.step} {self.number} {place}").getrandbits(31)

    def next(self, trainer: Any) -> None:
        """A draw begins."""
        step = (trainer.state.global_step, trainer._step)
        self.step, self.number = step, self.number + 1 if step == self.step else 0


class TransformersEngine:
    """TRL's own generation."""

    name = "transformers"

    def draw(self, prompts: Prompts, samples: Sequence[Sample], trainer: Any) -> Drawn:
        """See `Engine.draw`."""
        ids, images, fields = trainer._tokenize_prompts(list(prompts))
        answers, logprobs = trainer._generate_single_turn(ids, images, fields, trainer.num_generations)
        return Drawn(ids, answers, logprobs)

    def report(self) -> dict[str, Any]:
        """See `Engine.report`."""
        return {}

    def close(self) -> None:
        """See `Engine.close`."""


class Rollouts:
    """TRL's `rollout_func`: `tries` times, prompts whose answers all earn the same get new ones.

    The same prompts, so that the batch stays what it is: the trainer has its pictures already.
    """

    def __init__(self, engine: Engine, rewards: Rewards, tries: int):
        self.engine, self.rewards, self.tries = engine, rewards, tries
        self.groups = self.flat = 0  # drawn so far, and how many of them had to be drawn again

    def __call__(self, prompts: Prompts, trainer: Any) -> dict[str, Any]:
        samples, size = trainer.asked, trainer.num_generations
        drawn = self.engine.draw(prompts, samples, trainer)
        if self.tries:
            self._draw_again(drawn, prompts, samples, size, trainer)
        return drawn._asdict()

    def report(self) -> dict[str, Any]:
        """How many groups had to be drawn again, where that is asked for."""
        return {"drawn_again": round(self.flat / max(self.groups, 1), 4)} if self.tries else {}

    def _draw_again(self, drawn: Drawn, prompts: Prompts, samples: Sequence[Sample], size: int, trainer: Any) -> None:
        """Replace answers in place. Processes draw equally often, as generation with weights in parts asks for."""
        groups = [range(start, start + size) for start in range(0, len(prompts), size)]
        flat = list(self._flat(drawn, samples, groups, trainer))
        self.groups, self.flat = self.groups + len(groups), self.flat + len(flat)
        for _ in range(self.tries):
            if not trainer.accelerator.gather(torch.tensor([len(flat)], device=trainer.accelerator.device)).any():
                return
            places = [place for group in flat or groups[:1] for place in group]
            fresh = self.engine.draw([prompts[i] for i in places], [samples[i] for i in places], trainer)
            if flat:
                for place, answer in zip(places, fresh.completion_ids, strict=True):
                    drawn.completion_ids[place] = answer
                if drawn.logprobs is not None and fresh.logprobs is not None:
                    for place, logprobs in zip(places, fresh.logprobs, strict=True):
                        drawn.logprobs[place] = logprobs
                flat = list(self._flat(drawn, samples, flat, trainer))

    def _flat(self, drawn: Drawn, samples: Sequence[Sample], groups: Sequence[range], trainer: Any) -> Iterator[range]:
        """Those of `groups` whose answers all earn the same."""
        for group in groups:
            ids = [drawn.completion_ids[i] for i in group]
            texts = trainer.processing_class.batch_decode(ids, skip_special_tokens=True)
            totals = self.rewards.totals([samples[i] for i in group], texts, ids)
            if max(totals) - min(totals) < 1e-6:
                yield group


def check_groups(per_process: int, size: int, tries: int) -> None:
    """Refuse drawing again where the answers to a prompt lie on several processes. Raises `InputError`."""
    if tries and per_process % size:
        raise InputError(
            f"{per_process} answers on each process are not whole groups of {size}",
            where="recipe",
            field="train.rft.rollout.resample",
            remedy="Make per_device_train_batch_size × steps_per_generation a multiple of num_generations, or set 0",
        )
