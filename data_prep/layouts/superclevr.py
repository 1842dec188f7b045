"""Super-CLEVR (CVPR 2023, arXiv 2212.00259): `superCLEVR_questions_30k.json` and the folder `images`.

- One object: `questions` is a list of {`question`, `image_filename`, `answer`, `question_index`, …} (code of users).
- The file holds all parts. The cut by picture number, 20,000 to train, 5,000 to validate, 5,000 to test, is that of the
  paper from memory (second-hand): check it before comparing figures. Licence: not seen.
"""

import re
from collections.abc import Iterable
from typing import Any

from ..styles import build_prompt

_PARTS = {"train": range(20_000), "validation": range(20_000, 25_000), "test": range(25_000, 30_000)}


def rows(document: dict[str, Any]) -> Iterable[Any]:
    """The questions."""
    return document["questions"]


def row(raw: dict[str, Any], part: str) -> dict[str, Any] | None:
    """A question for a word, a number, or yes or no; `None` if its picture is another part's."""
    number = int(re.findall(r"\d+", raw["image_filename"])[-1])
    if number not in _PARTS[part]:
        return None
    answer = {True: "yes", False: "no"}.get(raw["answer"]) if isinstance(raw["answer"], bool) else str(raw["answer"])
    return {
        "id": raw.get("question_index"),
        "prompt": build_prompt(raw["question"], "short"),
        "completion": answer,
        "image": raw["image_filename"],
    }
