"""VQA in Parquet with the images inside: TextVQA (Hub `lmms-lab/textvqa`) and PathVQA (`flaviagiammarino/path-vqa`).

- Fields: `image`, `question`, and `answers` (ten people's) or `answer`, maybe `question_id`.
- TextVQA: CC BY 4.0 (second-hand); the test split has no answers, so validation is scored. PathVQA: MIT (card);
  19.7k / 6.26k / 6.72k questions, about half of them yes or no.
"""

from collections import Counter
from typing import Any

from ..styles import build_prompt


def row(raw: dict[str, Any], part: str) -> dict[str, Any]:
    """A question for a word or phrase; what most people answered is taught, what any answered is accepted."""
    answers = [str(answer) for answer in raw.get("answers") or [raw["answer"]]]
    return {
        "id": raw.get("question_id"),
        "prompt": build_prompt(raw["question"], "short"),
        "completion": Counter(answers).most_common(1)[0][0],
        "references": answers,
        "image": raw["image"],
    }
