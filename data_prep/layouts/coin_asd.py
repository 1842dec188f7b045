"""CoIN-ASD (SEFE, arXiv 2505.02486): CoIN with a share X of each training set in the other answer styles.

- Source: annotations Hub `jinpeng0528/CoIN-ASD` (MIT); images as for CoIN.
- `<Task>/train_ori.json` and `train_x{10,20,40,60,80}.json`: LLaVA JSON; `test.json`: as CoIN's.
- The files do not say which rows were converted. The style of a training row is told here from its question and answer
  (ours), since a task's own style does not hold for all of them.
"""

from typing import Any

from ..schema import Style
from ..styles import infer_style
from .coin import row as coin_row

# SEFE has five styles; what is another form of ours is one of them.
_OF_FIVE: dict[Style, Style] = {"number": "short", "label": "short", "latex": "short", "caption": "brief"}


def row(raw: dict[str, Any], part: str) -> dict[str, Any]:
    """As CoIN's, with the style of each training row."""
    converted = coin_row(raw, part)
    if "conversations" not in raw:
        return converted
    question, answer = (turn["value"] for turn in raw["conversations"][-2:])
    style = infer_style([answer], [question])
    return {**converted, "style": _OF_FIVE.get(style, style)}
