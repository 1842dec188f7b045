"""ASD by rule: wrong answers from the task's own, explanations not at all. Ours; SEFE converts with a model."""

import re
from collections.abc import Sequence
from typing import Any

from ..answers import normalise
from ..extraction import extract
from ..schema import Style
from ..styles import state_answer
from .distractors import Kind, Pool
from .turns import FREE_TEXT, Job, Material, Turn, Unreachable

_ABOUT_OPTIONS = re.compile(r"(?i:all|none|both|neither|either|any)\b|[A-H](?:, [A-H])* (?:and|or|&) [A-H]$")
_WRONG_OPTIONS = 3


class Rules:
    """Converts what needs no model. Rules cost nothing, so every candidate may be tried."""

    patience = None

    at_once = 256

    def __init__(self) -> None:
        self._pool = Pool()

    def learn(self, turns: Sequence[Turn]) -> None:
        """Take note of the answers of a dialogue."""
        for turn in turns:
            if turn.content and turn.kind:
                self._pool.add(turn.question, turn.content, turn.kind)

    def why_not(self, turn: Turn, style: Style) -> str | None:
        """Why a turn cannot be put into a style, as far as that is known without trying."""
        if style == "detailed":
            return "rules cannot write explanations"
        if turn.style in FREE_TEXT or (turn.style != "mcq" and turn.kind is None):
            return "the answer is free text"
        if turn.content is None:
            return "the answer names none of the options"
        if not turn.question:
            return "no question besides the format sentence"
        if turn.style == "mcq" and style != "mcq" and _ABOUT_OPTIONS.match(turn.content):
            return "the answer speaks about the options"
        if turn.kind is None and style != "yes_no":  # an option that is a sentence
            return "the answer is no word or phrase"
        return None

    def supply(self, jobs: Sequence[Job]) -> list[Material | Unreachable]:
        """The material of each job, or why there is none."""
        return [self._supply(job) for job in jobs]

    def provenance(self) -> dict[str, Any]:
        """What the report and every converted sample say of the converter."""
        return {"converter": "rules"}

    def usage(self) -> dict[str, Any]:
        """What it cost: nothing."""
        return {}

    def _supply(self, job: Job) -> Material | Unreachable:
        turn, why_not = job.turn, self.why_not(job.turn, job.style)
        if why_not:
            return Unreachable(why_not)
        try:
            match job.style:
                case "mcq":
                    return self._choice(job)
                case "yes_no":
                    return self._proposition(job)
                case "short":
                    return Material("option's text" if turn.style == "mcq" else "same answer")
                case _:
                    return Material("template sentence", text=_sentence(turn))
        except Unreachable as why:
            return why

    def _choice(self, job: Job) -> Material:
        turn = job.turn
        if turn.kind == "yes_no":
            return Material("yes or no", ["No" if normalise(turn.references[0]) == "yes" else "Yes"])
        wrong = self._wrong(turn, _WRONG_OPTIONS, job)
        return Material(f"{len(wrong)} wrong answers of the task's own kind", wrong)

    def _proposition(self, job: Job) -> Material:
        turn = job.turn
        if turn.kind == "yes_no":
            return Material("same answer")
        if not turn.options:
            return Material("another answer of the task's own kind", self._wrong(turn, 1, job))
        right = normalise(turn.references[0])
        wrong = [option for option in turn.options if normalise(option) != right and not _ABOUT_OPTIONS.match(option)]
        if not wrong:
            raise Unreachable("no wrong option that can be asked about alone")
        return Material("another of its options", [job.rng().choice(wrong)])

    def _wrong(self, turn: Turn, count: int, job: Job) -> list[str]:
        kind: Kind | None = turn.kind
        wrong = self._pool.wrong(turn.question, turn.references, kind, count, job.rng()) if kind else []
        if not wrong:
            raise Unreachable("no wrong answer of the same kind in the task")
        return wrong


def _sentence(turn: Turn) -> str:
    """A sentence that states the answer, such that the answer can be read out of it again."""
    content = turn.references[0]
    sentence = state_answer(content.lower() if turn.kind == "yes_no" else content.rstrip("."))
    read = extract("latex" if turn.kind == "latex" else "short", sentence)
    if read is None or normalise(read) != normalise(content):
        raise Unreachable("the answer cannot be read out of a sentence again")
    return sentence
