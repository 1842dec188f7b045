"""Published evaluation scripts by name, `family:task`: each computes what its authors' code does, defects included.

For comparing with published figures, and for nothing else: two families are not comparable with each other, and none
with a correct kind. A protocol reads the whole response as the model gave it (the authors' scripts strip white space
before they write it, so do we) and compares with the first reference, where the authors know one answer. What the
scripts do to a set of answers besides is not repeated: they join answers by their place in a file (ImageNet, captions),
or drop from the denominator what has no answer (CTBench; SEFE's ScienceQA).
"""

from dataclasses import replace

from ..kinds.base import Scorer
from . import coin, ctbench, mcitlib, sefe

FAMILIES: dict[str, dict[str, Scorer]] = {
    "coin": coin.TASKS,
    "sefe": sefe.TASKS,
    "mcitlib": mcitlib.TASKS,
    "ctbench": ctbench.TASKS,
    "ctbench_v2": ctbench.TASKS_V2,
}
PROTOCOLS: dict[str, Scorer] = {
    f"{family}:{task}": replace(scorer, name=f"{family}:{task}")
    for family, tasks in FAMILIES.items()
    for task, scorer in tasks.items()
}
