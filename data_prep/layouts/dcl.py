"""MLLM-DCL (MLLM-CL, arXiv 2506.05453): five domains, rows as CoIN's.

- Source: Hub `MLLM-CL/MLLM-CL` (Apache-2.0), one folder a domain: RS, Med, AD, Sci, Fin.
- Two domains are asked with a format sentence that their test files do not hold: the published evaluation adds it
  (MCITlib `model_pvqa.py`, `model_fin.py`, code). Whether the training files hold it was not seen.
"""

from typing import Any

from .coin import row as plain


def row(raw: dict[str, Any], part: str) -> dict[str, Any]:
    """RS, AD and Sci: as CoIN's."""
    return plain(raw, part)


def med(raw: dict[str, Any], part: str) -> dict[str, Any]:
    """Medicine: a word or phrase is asked for."""
    return _asking(plain(raw, part), "Answer the question with a single word (or phrase).")


def fin(raw: dict[str, Any], part: str) -> dict[str, Any]:
    """Finance: yes/no questions and multiple choice in one task, told apart by the gold answer as published."""
    if "conversations" in raw:
        closed = raw["conversations"][-1]["value"].strip() in ("Yes", "No")
        return {**raw, "style": "yes_no" if closed else "mcq"}
    if raw["answer"] in ("Yes", "No"):
        return {**_asking(plain(raw, part), "Only answer with yes or no directly."), "style": "yes_no"}
    return {**_asking(plain(raw, part), "Answer with the given letter directly, e.g., A, B, C, D."), "style": "mcq"}


def _asking(question: dict[str, Any], sentence: str) -> dict[str, Any]:
    return {**question, "prompt": f"{question['prompt']} {sentence}"} if "prompt" in question else question
