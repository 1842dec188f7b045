"""MLLM-CTBench (arXiv 2508.08275): seven tasks with chains of thought.

- Source: Hub `yueluoshuangtian/MLLM-CITBench`, `reasoning_{train,test}/<task>.json` and `img.zip` (4.2 GB); no licence
  was seen for the data.
- A row: `problem`, `solution`, `image` (absent in numglue and fomc), maybe `question_id` (code: `data/README.md` and
  the converter, which also knows `original_question` and `original_answer`). The LLaVA variant, which the repository's
  script makes, has `conversations` in `llava_train/<task>.json`, and `question_id`, `text`, `image` in
  `llava_eval/<task>.jsonl`, whose answers are those of `reasoning_test/<task>.json` (`answers:`).
- `solution` is `<think>…</think>` and then the answer, tagged or not; in test files maybe the answer alone.
- Defects: in the raw LLaVA rows of the picture tasks the reasoning stands in the human turn, after the sentence that
  asks for a form; in those of the text tasks it ends with "answer: X". One raw file is not all JSON
  (`prepare.on_bad: drop` passes over it and counts). About 17 % of the traces contradict their answer (authors' audit).
"""

import re
from typing import Any

from ..answers import split_tags
from ..schema import Style
from ..styles import infer_style

_ASKS_FOR_FORM = re.compile(
    r"answer with the option'?s letter(?: from the given choices)?(?: directly)?\.?"
    r"|using a single word or phrase\.?|answer (?:the question )?briefly\.?",
    re.IGNORECASE,
)
_STATES_ANSWER = re.compile(r",?\s*\banswer\s*:\s*", re.IGNORECASE)
_LEAST_REASONING = 15  # characters after the sentence that asks for a form; less is punctuation


def row(raw: dict[str, Any], part: str) -> dict[str, Any]:
    """A question, and its answer as `<think>…</think><answer>…</answer>` where the reasoning is given."""
    if "conversations" in raw:
        question, solution = (turn["value"].strip() for turn in raw["conversations"][:2])
        question = question.replace("<image>", "").strip()
        if not re.search(r"</?(?:think|answer)>", solution):
            question, solution = _take_apart(question, solution)
    else:
        question = raw.get("problem") or raw.get("text") or raw["original_question"]
        solution = raw.get("solution") or raw.get("original_answer")
    converted = {"id": raw.get("question_id", raw.get("id")), "prompt": question, "image": raw.get("image")}
    if solution is None:
        return converted
    think, answer = split_tags(solution)
    return {**converted, "completion": _solution(think, answer), "references": [answer]}


def math(raw: dict[str, Any], part: str) -> dict[str, Any]:
    """Math VQA: letters, yes or no, and numbers in one task; the style of each row is that of its answer."""
    converted = row(raw, part)
    if "references" not in converted:
        return converted
    style: Style = infer_style(converted["references"], [converted["prompt"]])
    return {**converted, "style": style if style in ("mcq", "yes_no", "number") else "short"}


def _take_apart(question: str, solution: str) -> tuple[str, str]:
    """The question without the reasoning that was left in it, and the solution with it."""
    stated = list(_STATES_ANSWER.finditer(solution))
    if stated and solution[: stated[-1].start()].strip():
        return question, _solution(solution[: stated[-1].start()], solution[stated[-1].end() :])
    asked = list(_ASKS_FOR_FORM.finditer(question))
    if asked and len(question) - asked[-1].end() > _LEAST_REASONING:
        return question[: asked[-1].end()], _solution(question[asked[-1].end() :], solution)
    return question, solution


def _solution(think: str | None, answer: str) -> str:
    return f"<think>{think.strip()}</think><answer>{answer.strip()}</answer>" if think else answer.strip()
