"""Accepted answers that stand in a file of their own (`answers:` of a task).

A file is told by its fields, as rows are:

- a list of objects with an id and `answers`, `answer` or `solution`, alone or under `data` (TextVQA);
- an object by question id: GQA's questions, ScienceQA's `problems.json` (where the answer is a choice's number);
- COCO captions, `{"annotations": [{"image_id", "caption"}]}`, numbered by the question's place in the test file from 1,
  as UCIT's are (MCITlib's evaluation, code).
"""

import string
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from .answers import split_tags
from .errors import InputError
from .files import read_json

_FIELDS = ("answers", "answer", "solution")


class Answers:
    """The answers of a file, for the rows of a test part. Raises `InputError` for what is no such file."""

    def __init__(self, path: Path):
        self.path = path
        document = read_json(path)
        self.by_place = isinstance(document, dict) and isinstance(document.get("annotations"), list)
        self.found = self._captions(document["annotations"]) if self.by_place else self._by_id(document)

    def give(self, row: dict[str, Any], place: int, where: str) -> dict[str, Any]:
        """The row, the `place`-th of its file from 1, with its references. Raises `InputError` if it has none."""
        key = str(place if self.by_place else row.get("id"))
        if key not in self.found:
            what = "place" if self.by_place else "id"
            raise InputError(f"no answer to the question of {what} {key} in {self.path}", where=where, field="answers")
        most_common = Counter(self.found[key]).most_common(1)[0][0]
        return {**row, "references": self.found[key], "completion": row.get("completion") or most_common}

    def check_places(self, count: int) -> None:
        """Refuse a file of captions that is not as long as the test file of `count` rows, which would shift them."""
        if self.by_place and count != len(self.found):
            problem = f"holds captions of {len(self.found)} images, and the test file has {count} rows"
            raise InputError(problem, where=self.path, field="answers")

    def _captions(self, annotations: list[Any]) -> dict[str, list[str]]:
        found: dict[str, list[str]] = defaultdict(list)
        for row in annotations:
            if not isinstance(row, dict) or not {"image_id", "caption"} <= row.keys():
                raise InputError(f"no image_id and caption in {str(row)[:60]!r}", where=self.path, field="answers")
            found[str(row["image_id"])].append(str(row["caption"]))
        if found.keys() != {str(place) for place in range(1, len(found) + 1)}:
            remedy = "The captions are told apart by the question's place in the test file"
            raise InputError(f"image_id is not 1 to {len(found)}", where=self.path, field="answers", remedy=remedy)
        return dict(found)

    def _by_id(self, document: Any) -> dict[str, list[str]]:
        if isinstance(document, dict) and isinstance(document.get("data"), list):
            document = document["data"]
        if isinstance(document, list):
            rows = [(row.get("question_id", row.get("id")), row) for row in document if isinstance(row, dict)]
        elif isinstance(document, dict):
            rows = list(document.items())
        else:
            raise InputError("is neither a list nor an object", where=self.path, field="answers")
        return {str(identity): texts for identity, row in rows if (texts := _texts(row))}


def _texts(row: Any) -> list[str]:
    """The answers of one entry; none where it has none, as the rows of a test set without published answers."""
    value = next((row[field] for field in _FIELDS if field in row), None) if isinstance(row, dict) else None
    if isinstance(value, int) and isinstance(row.get("choices"), list) and 0 <= value < len(row["choices"]):
        return [string.ascii_uppercase[value]]
    values = value if isinstance(value, list) else [] if value is None else [value]
    said = [item.get("answer") if isinstance(item, dict) else item for item in values]
    return [text for item in said if item is not None and (text := split_tags(str(item))[1])]
