"""SEFE (arXiv 2505.02486), as its code scores: jinpeng0528/SEFE @2f61efe, `llava/eval/CoIN/eval_*.py`.

CoIN's scripts, defects included, with another ScienceQA: figures of the two are not comparable there. The repository
has no script for a judge.
"""

import re

from mcit.data_prep.schema import Sample

from . import coin
from .base import protocol


def _scienceqa(response: str, references: list[str], sample: Sample) -> float:
    """The letter, or what one sentence "The answer is X." says. Defect: of two such sentences, none counts."""
    said = re.findall(r"The answer is ([A-Z]).", response)
    return coin.option(coin.named_first(response) or (said[0] if len(said) == 1 else ""), references, sample)


TASKS = {task: scorer for task, scorer in coin.TASKS.items() if task != "knowledge"}
TASKS |= {"scienceqa": protocol(_scienceqa)}
