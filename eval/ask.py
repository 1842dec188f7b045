"""One question to the policies of several stages, for looking by hand (`mcit ask`)."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mcit.data_prep.errors import InputError
from mcit.data_prep.images import inspect_image
from mcit.data_prep.schema import Message

from .config import EvalConfig
from .engines import generate, make_engine, share
from .engines.base import Policy, Request, read_policy


class Asked(NamedTuple):
    """What the policy of one stage answers, greedily."""

    stage: int
    name: str
    answer: str
    finished: bool  # False: cut off at `max_new_tokens`
    probability: float | None  # of the whole answer and its end; None if it was cut off


def read_policies(run_dir: Path, stages: Sequence[int]) -> list[Policy]:
    """The policies of `stages` (none named: of all that are there), in order. Raises `InputError`."""
    folders = {int(file.parent.name[:2]): file.parent for file in (run_dir / "stages").glob("[0-9]*-*/serving.json")}
    if not folders:
        raise InputError("holds no policy", where=run_dir / "stages", remedy="Train first: `mcit run`")
    for stage in stages:
        if stage not in folders:
            known = ", ".join(map(str, sorted(folders)))
            raise InputError(f"there is no stage {stage}", where=run_dir, field="--stage", remedy=f"There are {known}")
    return [read_policy(folders[stage]) for stage in sorted(set(stages) or folders)]


def ask(
    policies: Sequence[Policy],
    question: str,
    images: Sequence[Path],
    config: EvalConfig,
    say: Callable[[str], None] = print,
) -> list[Asked]:
    """Ask each policy the same, as a user turn with `images` before the words; policies on one model share an engine.

    Raises `InputError`, also for an image that does not open.
    """
    for image in images:
        inspect_image(image)
    prompt: list[Message] = [{"role": "user", "content": question}]
    found: list[Asked] = []
    for group in share(policies, config):
        engine: Any = make_engine(group, config, len(images), say=say)
        try:
            requests = [Request(prompt, images, policy) for policy in group]
            answers = generate(engine, requests, config.max_new_tokens)
            scored = engine.logprobs([r._replace(completion=a.text) for r, a in zip(requests, answers, strict=True)])
        finally:
            engine.close()
        for policy, answer, score in zip(group, answers, scored, strict=True):
            probability = math.exp(sum(score.logprobs)) if answer.finished else None
            serving = policy.serving
            found.append(Asked(serving.stage, serving.name, answer.text, answer.finished, probability))
    return sorted(found)
