"""Wrong answers of the right kind: from the task's own answers, or by perturbing a number or a box."""

import bisect
import random
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import Literal

from ..answers import is_phrase, normalise, read_box, read_number
from ..schema import Style

_Key = tuple[str, ...]  # (kind,) or (kind, question type)
Kind = Literal["yes_no", "number", "bbox", "latex", "text"]
_MAX_IOU = 0.5  # from here on a box counts as right
_TRIES = 64  # answers drawn before a large pool counts as exhausted


def answer_kind(answer: str, style: Style) -> Kind | None:
    """What a closed answer is, or `None` for free text."""
    if style == "latex":
        return "latex"
    if normalise(answer) in ("yes", "no"):
        return "yes_no"
    if read_box(answer):
        return "bbox"
    if read_number(answer) is not None:
        return "number"
    return "text" if is_phrase(answer) else None


def same_answer(one: str, other: str) -> bool:
    """Whether two phrases may mean the same: equal but for case, articles, spacing and plural, or one in the other."""
    first, second = ([word.removesuffix("s") for word in normalise(text).split()] for text in (one, other))
    if "".join(first) == "".join(second):
        return True
    return set(first) <= set(second) or set(second) <= set(first)


def iou(one: Sequence[float], other: Sequence[float]) -> float:
    """Intersection over union of two boxes [x1, y1, x2, y2]."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    inter = max(0.0, width) * max(0.0, height)
    area = (one[2] - one[0]) * (one[3] - one[1]) + (other[2] - other[0]) * (other[3] - other[1])
    return inter / (area - inter)


class Pool:
    """The distinct answers of a task, by kind and, within it, by how the question begins ("what color", "how many")."""

    def __init__(self, answers: Iterable[tuple[str, str, Kind]] = ()):
        """`answers` are (question, answer, kind)."""
        self._found: dict[_Key, dict[str, str]] = defaultdict(dict)
        for question, answer, kind in answers:
            self.add(question, answer, kind)

    def add(self, question: str, answer: str, kind: Kind) -> None:
        """One more answer. All are added before any is drawn."""
        normal = normalise(answer)
        for key in ((kind,), (kind, question_type(question))):
            forms = self._found[key]
            forms[normal] = min(forms.get(normal, answer), answer)  # whatever order the samples come in

    @cached_property
    def _answers(self) -> dict[_Key, list[str]]:
        return {key: [forms[form] for form in sorted(forms)] for key, forms in self._found.items()}

    @cached_property
    def _numbers(self) -> dict[_Key, list[str]]:
        return {
            key: sorted(answers, key=lambda answer: float(str(read_number(answer))))
            for key, answers in self._answers.items()
            if key[0] == "number"
        }

    def wrong(self, question: str, references: Sequence[str], kind: Kind, count: int, rng: random.Random) -> list[str]:
        """Up to `count` answers of the same kind that differ from each other and from every reference.

        The first reference is the answer taught; its way of writing numbers and boxes is followed.
        """
        keys: list[_Key] = [(kind, question_type(question)), (kind,)]
        match kind:
            case "yes_no":
                return ["No" if normalise(references[0]) == "yes" else "Yes"]
            case "number":
                return self._wrong_numbers(keys, references, count, rng)
            case "bbox":
                return self._wrong_boxes(keys, references, count, rng)
            case "latex":
                squeezed = {re.sub(r"\s", "", reference) for reference in references}
                return self._draw(keys, count, rng, lambda a, chosen: re.sub(r"\s", "", a) not in squeezed)
        return self._draw(
            keys, count, rng, lambda answer, chosen: not any(same_answer(answer, o) for o in [*references, *chosen])
        )

    def _draw(
        self, keys: list[_Key], count: int, rng: random.Random, differs: Callable[[str, list[str]], bool]
    ) -> list[str]:
        """Draw distinct answers that `differs(answer, chosen)` lets pass, from the first pool, then from the next."""
        chosen: list[str] = []
        for key in keys:
            answers = self._answers.get(key, [])
            for answer in rng.sample(answers, min(len(answers), _TRIES)):
                if len(chosen) < count and answer not in chosen and differs(answer, chosen):
                    chosen.append(answer)
        return chosen

    def _wrong_numbers(self, keys: list[_Key], references: Sequence[str], count: int, rng: random.Random) -> list[str]:
        """Near numbers are the plausible ones: from the nearest of the task's own, then neighbours of the answer."""
        right = {float(number) for number in map(read_number, references) if number is not None}
        value = float(str(read_number(references[0])))
        near: list[str] = []
        for key in keys:
            numbers = self._numbers.get(key, [])
            middle = bisect.bisect_left(numbers, value, key=lambda answer: float(str(read_number(answer))))
            near += numbers[max(0, middle - 2 * count) : middle + 2 * count + 1]
        rng.shuffle(near)
        digits = str(read_number(references[0]))
        decimals = len(digits.partition(".")[2])
        for step in rng.sample(range(1, 4 * count + 1), 4 * count):
            other = value + rng.choice((-1, 1)) * step * 10**-decimals
            if other >= 0 or value < 0:
                near.append(references[0].replace(",", "").replace(digits, f"{other:.{decimals}f}", 1))
        chosen: dict[float, str] = {}
        for answer in near:
            number = float(str(read_number(answer)))
            if number not in right and number not in chosen and len(chosen) < count:
                chosen[number] = answer
        return list(chosen.values())

    def _wrong_boxes(self, keys: list[_Key], references: Sequence[str], count: int, rng: random.Random) -> list[str]:
        """Boxes of other samples, else the answer's box moved, that overlap neither a reference nor each other much."""
        right = [[float(x) for x in box] for box in map(read_box, references) if box]

        def differs(answer: str, chosen: list[str]) -> bool:
            box = [float(x) for x in read_box(answer) or []]
            others = [[float(x) for x in read_box(other) or []] for other in chosen]
            return all(iou(box, other) < _MAX_IOU for other in [*right, *others])

        chosen = self._draw(keys, count, rng, differs)
        coordinates = read_box(references[0]) or []
        decimals = max(len(x.partition(".")[2]) for x in coordinates)
        x1, y1, x2, y2 = right[0]
        boxes = [read_box(answer) or ["1"] for answer in self._answers[("bbox",)]]
        limit = max(1.0, *(float(x) for box in boxes for x in box))
        for _ in range(_TRIES):
            if len(chosen) == count:
                break
            left, top = rng.uniform(0, limit - (x2 - x1)), rng.uniform(0, limit - (y2 - y1))
            moved = (left, top, left + x2 - x1, top + y2 - y1)
            answer = f"[{', '.join(f'{x:.{decimals}f}' for x in moved)}]"
            if read_box(answer) and differs(answer, chosen):
                chosen.append(answer)
        return chosen


def question_type(question: str) -> str:
    """The first two words of a question's last line, without case: what colour, how many, …"""
    lines = question.strip().splitlines()
    return " ".join(re.findall(r"\w+", lines[-1].lower())[:2]) if lines else ""
