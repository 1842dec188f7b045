"""MMLU-Pro (arXiv 2406.01574), a general probe without images: Hub `TIGER-Lab/MMLU-Pro` (MIT, card), Parquet.

Fields: `question_id`, `question`, `options` (up to ten), `answer` (a letter), `cot_content`, `category`. The published
protocol gives five worked examples; here the question is asked alone (ours).
"""

from typing import Any

from ..styles import build_prompt


def row(raw: dict[str, Any], part: str) -> dict[str, Any]:
    """A multiple-choice question."""
    options = list(raw["options"])
    return {
        "id": raw["question_id"],
        "prompt": build_prompt(raw["question"], "mcq", options=options),
        "completion": raw["answer"],
        "meta": {"options": options},
    }
