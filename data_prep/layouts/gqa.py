"""GQA, the official files: `{train,testdev}_balanced_questions.json`, pictures `<imageId>.jpg` in one folder.

- Source: Stanford, `questions1.2.zip` and `images.zip`; CC BY 4.0 (second-hand).
- A file is one object: question id to {`question`, `imageId`, `answer`, `fullAnswer`, …}.
- 943,000 balanced training and 12,578 testdev questions; the file is read at once.
"""

from collections.abc import Iterable
from typing import Any

from ..styles import build_prompt


def rows(document: dict[str, Any]) -> Iterable[dict[str, Any]]:
    """Each question with its id."""
    return ({**question, "question_id": identity} for identity, question in document.items())


def row(raw: dict[str, Any], part: str) -> dict[str, Any]:
    """A question for a word or phrase."""
    return {
        "id": raw["question_id"],
        "prompt": build_prompt(raw["question"], "short"),
        "completion": raw["answer"],
        "image": f"{raw['imageId']}.jpg",
    }
