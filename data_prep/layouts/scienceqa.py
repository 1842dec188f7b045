"""ScienceQA: Hub `derek-thomas/ScienceQA`, Parquet with the images inside.

- Fields: `image` (or none), `question`, `choices`, `answer` (a choice's number from 0), `hint`, `lecture`, `solution`.
- Licence: CC BY-NC-SA 4.0 (second-hand; the card could not be read).
- 12,726 / 4,241 train / test questions, half of them without an image (second-hand).
"""

import string
from typing import Any

from ..styles import build_prompt


def row(raw: dict[str, Any], part: str) -> dict[str, Any]:
    """The hint as context before the question, then lettered options; the answer is a letter."""
    question = f"Context: {raw['hint']}\n{raw['question']}" if raw.get("hint") else raw["question"]
    options = list(raw["choices"])
    return {
        "prompt": build_prompt(question, "mcq", options=options),
        "completion": string.ascii_uppercase[raw["answer"]],
        "image": raw.get("image"),
        "meta": {"options": options, "question": question},
    }
