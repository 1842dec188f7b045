"""One question and its answer, taken out of a dialogue, and put into another style by rule."""

import dataclasses
import random
import re
import string
from collections.abc import Sequence

from ..answers import extract, normalise
from ..schema import Reasoning, Sample, Style
from ..styles import THINK, build_prompt, split_prompt, split_reasoning, state_answer, state_proposition
from .distractors import Kind, Pool, answer_kind

FREE_TEXT: tuple[Style, ...] = ("brief", "detailed", "caption")
_ABOUT_OPTIONS = re.compile(r"(?i:all|none|both|neither|either|any)\b|[A-H](?:, [A-H])* (?:and|or|&) [A-H]$")
_MCQ_OPTIONS = 4


class Unreachable(Exception):
    """This question cannot be put into this style by rule; the text says why."""


class Decks:
    """Deals 0 … n-1 in shuffled rounds, so that every position comes equally often."""

    def __init__(self, rng: random.Random):
        self._rng = rng
        self._cards: dict[tuple[str, int], list[int]] = {}

    def deal(self, name: str, n: int) -> int:
        """The next card of the deck `name` of `n` cards."""
        cards = self._cards.setdefault((name, n), [])
        if not cards:
            cards += self._rng.sample(range(n), n)
        return cards.pop()


@dataclasses.dataclass(frozen=True)
class Turn:
    """A question and its answer. `content` is what the answer says (of an mcq: the option's text), `kind` what it is.

    `references` holds `content` first and then every other accepted answer.
    """

    user: str
    question: str
    options: list[str] | None
    format: str
    think: str | None
    answer: str
    content: str | None
    kind: Kind | None
    references: list[str]
    style: Style


@dataclasses.dataclass(frozen=True)
class Converted:
    """A turn in another style; `how` says by which rule."""

    user: str
    answer: str
    options: list[str] | None
    how: str


def take_apart(sample: Sample, known_formats: Sequence[str]) -> list[Turn]:
    """The turns of a sample, each without the sentences that ask for its format."""
    messages = [m for m in [*sample["prompt"], *sample["completion"]] if m["role"] != "system"]
    style, meta, turns = sample["style"], sample.get("meta", {}), []
    for index in range(0, len(messages), 2):
        user, response = messages[index]["content"], messages[index + 1]["content"]
        last = index + 2 == len(messages)
        question, options, format_sentence = split_prompt(user, known_formats)
        if len(messages) == 2:
            question, options = meta.get("question", question), meta.get("options", options)
        think, answer, _ = split_reasoning(response, sample["reasoning"])
        references = sample["references"] if last else []
        content: str | None = answer
        if style == "mcq":
            letter = extract("mcq", answer, options=options) if options else None
            content = (options or [])[string.ascii_uppercase.index(letter)] if letter else None
            references = []
        kind = answer_kind(content, style) if content and style not in FREE_TEXT else None
        accepted = [content or answer, *(reference for reference in references if reference != content)]
        turns.append(Turn(user, question, options, format_sentence, think, answer, content, kind, accepted, style))
    return turns


def reachable(turn: Turn, style: Style) -> str | None:
    """Why the rules cannot put a turn into a style, as far as that is known without trying; `None` if nothing speaks
    against it."""
    if style == "detailed":
        return "rules cannot write explanations"
    if turn.style in FREE_TEXT or (turn.style != "mcq" and turn.kind is None):
        return "the answer is free text"
    if turn.content is None or turn.kind is None:
        return "the answer names none of the options"
    if not turn.question:
        return "no question besides the format sentence"
    if turn.style == "mcq" and style in ("short", "yes_no") and _ABOUT_OPTIONS.match(turn.content):
        return "the answer speaks about the options"
    return None


def convert_turn(
    turn: Turn, style: Style, reasoning: Reasoning, pool: Pool, rng: random.Random, decks: Decks
) -> Converted:
    """Put a turn into a style. Raises `Unreachable`; the decks are dealt from only when the conversion succeeds."""
    why_not = reachable(turn, style)
    if why_not or turn.content is None or turn.kind is None:
        raise Unreachable(why_not or "the answer is free text")
    question, options, content = turn.question, None, turn.content
    match style:
        case "mcq":
            options, answer, how = _choice(turn, turn.kind, pool, rng, decks)
        case "yes_no":
            question, answer, how = _proposition(turn, turn.kind, pool, rng, decks)
        case "short":
            answer, how = content, "option's text" if turn.style == "mcq" else "same answer"
        case "brief":
            answer, how = _sentence(content, turn.kind), "template sentence"
        case _:
            raise ValueError(f"{style} is no style of ASD")
    asks_thinking = reasoning if THINK in turn.format else "none"
    user = build_prompt(question, style, options=options, reasoning=asks_thinking)
    if turn.think is not None:
        answer = f"<think>{turn.think}</think><answer>{answer}</answer>"
    return Converted(user, answer, options, how)


def _choice(turn: Turn, kind: Kind, pool: Pool, rng: random.Random, decks: Decks) -> tuple[list[str], str, str]:
    if kind == "yes_no":
        wrong, right, how = pool.wrong(turn.question, turn.references, kind, 1, rng), turn.references[0], "yes or no"
        right = "Yes" if normalise(right) == "yes" else "No"
    else:
        wrong, right = pool.wrong(turn.question, turn.references, kind, _MCQ_OPTIONS - 1, rng), turn.references[0]
        how = f"{len(wrong)} wrong answers of the task's own kind"
    if not wrong:
        raise Unreachable("no wrong answer of the same kind in the task")
    position = decks.deal("mcq", len(wrong) + 1)
    options = [*wrong[:position], right, *wrong[position:]]
    return options, string.ascii_uppercase[position], how


def _proposition(turn: Turn, kind: Kind, pool: Pool, rng: random.Random, decks: Decks) -> tuple[str, str, str]:
    content = turn.references[0]
    if kind == "yes_no":
        return turn.question, "Yes" if normalise(content) == "yes" else "No", "same answer"
    if turn.options:
        right = normalise(content)
        wrong = [o for o in turn.options if normalise(o) != right and not _ABOUT_OPTIONS.match(o)]
        candidate = rng.choice(wrong) if wrong else None
    else:
        candidate = next(iter(pool.wrong(turn.question, turn.references, kind, 1, rng)), None)
    if candidate is None:
        raise Unreachable("no wrong answer of the same kind in the task")
    true = decks.deal("yes_no", 2) == 0
    question = state_proposition(turn.question, content if true else candidate)
    return question, "Yes" if true else "No", "true proposition" if true else "false proposition"


def _sentence(content: str, kind: Kind) -> str:
    """A sentence that states the answer, such that the answer can be read out of it again."""
    said = content.lower() if kind == "yes_no" else content.rstrip(".")
    sentence = state_answer(said)
    read = extract("latex" if kind == "latex" else "short", sentence)
    if read is None or normalise(read) != normalise(content):
        raise Unreachable("the answer cannot be read out of a sentence again")
    return sentence
