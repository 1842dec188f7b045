"""Streams beyond a fixed order: tasks that re-occur at random, and stages whose boundaries are blurred.

Both change which data a stage trains, never what a task is: `learned`, and with it every metric, stays defined.
"""

import random
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from pydantic import Field

from mcit.data_prep.errors import InputError
from mcit.data_prep.identity import rank
from mcit.data_prep.schema import Config, Sample

if TYPE_CHECKING:
    from .schema import Stage


class RecurConfig(Config):
    """`recur:` of a recipe: each stage draws its tasks from the stream (as in SCoLe, from memory).

    The first of the stream is drawn with weight 1, the n-th with n^-exponent: 0 draws all alike, 1 is Zipf's law.
    """

    stages: int = Field(gt=0)
    tasks: int = Field(default=1, gt=0)  # different ones a stage
    exponent: float = Field(default=0.0, ge=0)

    def draw(self, names: Sequence[str], seed: int) -> list[list[str]]:
        """The tasks of each stage. Raises `InputError` where a task never occurs: it could not be learned."""
        if self.tasks > len(names):
            raise InputError(f"{self.tasks} tasks a stage, and the stream has {len(names)}", field="recur.tasks")
        rng = random.Random(seed)
        stages = []
        for _ in range(self.stages):
            left, drawn = {name: n**-self.exponent for n, name in enumerate(names, 1)}, list[str]()
            while len(drawn) < self.tasks:
                drawn += rng.choices(list(left), list(left.values()))
                del left[drawn[-1]]
            stages.append(drawn)
        if never := set(names).difference(*stages):
            problem = f"{', '.join(sorted(never))} would not occur in {self.stages} stages under seed {seed}"
            raise InputError(problem, field="recur", remedy="Ask for more stages, or set another seed")
        return stages


def trained_in(
    samples: Iterable[Sample], k: int, home: Sequence[int], stages: int, blur: float, seed: int
) -> list[Sample]:
    """Those of a task's samples that stage `k` trains, of stages 1 to `stages`, when `home` are the task's own.

    A share `blur` of the samples leaves home, each for one other stage (as Si-Blurry's, from memory); which and where
    depends on the sample's id and the seed alone.
    """
    others = [stage for stage in range(1, stages + 1) if stage not in home]

    def trains(sample: Sample) -> bool:
        drawn = random.Random(rank(f"blur {seed} {sample['task']} {sample['id']}"))
        leaves = bool(others) and drawn.random() < blur
        return drawn.choice(others) == k if leaves else k in home

    return [sample for sample in samples if trains(sample)]


def past_of(
    stages: Sequence["Stage"], k: int, samples: Iterable[Sample], trained: Callable[["Stage"], Iterable[Sample]]
) -> dict[int, list[Sample]]:
    """What stages before `k` trained and `k`, with its `samples`, does not: each by the stage that trained it last."""
    seen = {(sample["task"], sample["id"]) for sample in samples}
    past = {}
    for earlier in reversed(stages[: k - 1]):
        past[earlier.k] = [sample for sample in trained(earlier) if (sample["task"], sample["id"]) not in seen]
        seen |= {(sample["task"], sample["id"]) for sample in past[earlier.k]}
    return {stage: past[stage] for stage in sorted(past) if past[stage]}
