"""One question and its answer, taken out of a dialogue, and put together again in another style."""

import dataclasses
import random
import string
from collections.abc import Sequence

from ..answers import normalise
from ..extraction import extract
from ..schema import Reasoning, Sample, Style
from ..styles import THINK, build_prompt, fits, split_prompt, split_reasoning, state_proposition
from .distractors import Kind, answer_kind

FREE_TEXT: tuple[Style, ...] = ("brief", "detailed", "caption")


class Unreachable(Exception):
    """This question cannot be put into this style; the text says why."""


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
class Job:
    """One turn of a sample, wanted in a style. What is drawn for it depends on nothing but its `seed`."""

    turns: Sequence[Turn]
    position: int
    style: Style
    images: Sequence[str]
    seed: str

    def rng(self) -> random.Random:
        """The job's own generator, at its start."""
        return random.Random(self.seed)

    @property
    def turn(self) -> Turn:
        """The turn that is wanted in another style."""
        return self.turns[self.position]


@dataclasses.dataclass(frozen=True)
class Material:
    """What a converter supplies for one job; `assemble` makes the turn of it.

    `wrong` are an mcq's wrong options, or the one wrong alternative of a proposition (none where the question asks for
    yes or no already); `text` is an explanation; `options` are shown with the question of an explanation.
    """

    how: str
    wrong: Sequence[str] = ()
    text: str = ""
    options: list[str] | None = None


@dataclasses.dataclass(frozen=True)
class Converted:
    """A turn in another style; `how` says where the new answer is from."""

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


def assemble(turn: Turn, style: Style, material: Material, reasoning: Reasoning, decks: Decks) -> Converted:
    """Put a turn into a style. Raises `Unreachable`; the decks are dealt from only when that has not happened.

    Where the right option stands and whether a proposition is true is dealt here, for every converter alike.
    """
    right = turn.references[0]
    if turn.kind == "yes_no":
        right = "Yes" if normalise(right) == "yes" else "No"
    question, options, how = turn.question, material.options, material.how
    match style:
        case "mcq":
            position = decks.deal("mcq", len(material.wrong) + 1)
            options = [*material.wrong[:position], right, *material.wrong[position:]]
            answer = string.ascii_uppercase[position]
        case "yes_no" if turn.kind == "yes_no":
            answer = right
        case "yes_no":
            true = decks.deal("yes_no", 2) == 0
            question = state_proposition(question, right if true else material.wrong[0])
            answer, how = "Yes" if true else "No", f"{'true' if true else 'false'} proposition, {how}"
        case "short":
            answer = turn.references[0]
        case _:
            answer = material.text
    if not fits(style, answer, options=options):
        raise Unreachable("the new answer does not have the form of the style")
    asks_thinking = reasoning if THINK in turn.format else "none"
    user = build_prompt(question, style, options=options, reasoning=asks_thinking)
    if turn.think is not None:
        answer = f"<think>{turn.think}</think><answer>{answer}</answer>"
    return Converted(user, answer, options, how)
