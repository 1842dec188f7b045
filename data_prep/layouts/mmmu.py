"""MMMU (arXiv 2311.16502), a general probe: Hub `MMMU/MMMU`, Parquet, one folder a subject.

- Fields: `id`, `question`, `options` (a list written as text), `answer` (a letter; where `question_type` is open, a
  text or a list written as text), `image_1` to `image_7`, which question and options name `<image 1>` and so on.
- Scored on validation (900 questions; second-hand): the answers of test are not public. Licence: Apache-2.0
  (second-hand).
"""

import ast
import re
from typing import Any

from ..schema import Style
from ..styles import build_prompt


def row(raw: dict[str, Any], part: str) -> dict[str, Any]:
    """A multiple-choice question, or one for a word or phrase; all images come first and keep their numbers."""
    options = [_named(option) for option in ast.literal_eval(raw["options"])]
    answer = raw["answer"]
    answers = [str(one) for one in ast.literal_eval(answer)] if answer.startswith("[") else [answer]
    style: Style = "mcq" if raw["question_type"] == "multiple-choice" else "short"
    return {
        "id": raw["id"],
        "prompt": build_prompt(_named(raw["question"]), style, options=options if style == "mcq" else None),
        "completion": answers[0],
        "references": answers,
        "images": [raw[f"image_{n}"] for n in range(1, 8) if raw.get(f"image_{n}") is not None],
        "style": style,
        "meta": {"options": options} if style == "mcq" else {},
    }


def _named(text: str) -> str:
    return re.sub(r"<image (\d)>", r"image \1", text)
