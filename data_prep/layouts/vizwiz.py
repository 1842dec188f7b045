"""VizWiz-VQA, the official files: `Annotations/{train,val}.json` and the pictures in `train/` and `val/`.

- Source: vizwiz.org, CC BY 4.0 (second-hand). A list of {`image`, `question`, `answers`: ten of {`answer`,
  `answer_confidence`}}; 20,523 / 4,319 questions (second-hand).
- The test split has no public answers: validation is scored. Pictures taken by blind people; many questions have no
  answer, and "unanswerable" is one.
"""

from typing import Any

from .vqa import row as vqa_row


def row(raw: dict[str, Any], part: str) -> dict[str, Any]:
    """As any VQA; a picture lies in the folder of its split."""
    folder = "train" if part == "train" else "val"
    answers = [answer["answer"] for answer in raw["answers"]]
    return vqa_row({**raw, "image": f"{folder}/{raw['image']}", "answers": answers}, part)
