"""Geometry3K: Hub `hiyouga/geometry3k` (MIT, card), Parquet with the images inside; 2.1k / 300 / 601 problems.

Fields: `images`, `problem` (with `<image>`), `answer`: a number or a LaTeX expression, without units.
"""

from typing import Any


def row(raw: dict[str, Any], part: str) -> dict[str, Any]:
    """The problem and its answer as they are: a form is asked for by the recipe (`format:`)."""
    return {"prompt": raw["problem"], "completion": str(raw["answer"]), "images": raw["images"]}
