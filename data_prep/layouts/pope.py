"""POPE (arXiv 2305.10355), a general probe of object hallucination: yes/no questions on COCO pictures.

- Source: Hub `lmms-lab/POPE`, Parquet (`question_id`, `question`, `answer`, `image`, `category`), or the official
  `coco_pope_{random,popular,adversarial}.json`, an object a line (`question_id`, `text`, `label`, `image`, a file of
  COCO val2014). Licence: not seen.
- Three categories of 3,000 questions (second-hand) that number their questions alike.
"""

from typing import Any

from ..styles import build_prompt


def row(raw: dict[str, Any], part: str) -> dict[str, Any]:
    """A yes/no question."""
    question, answer = (raw["text"], raw["label"]) if "label" in raw else (raw["question"], raw["answer"])
    category = raw.get("category")
    return {
        "id": f"{category}-{raw['question_id']}" if category else raw["question_id"],
        "prompt": build_prompt(question, "yes_no"),
        "completion": answer,
        "image": raw["image"],
    }
