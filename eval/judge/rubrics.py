"""What a judge looks for. The three dimensions and the four bands are those of MLLM-CTBench (arXiv 2508.08275); the
words are ours.
"""

from typing import Literal, get_args

from mcit.data_prep.errors import InputError

VERSION = 1  # raise it with any change of the words here or in prompts.py: every judgement names it and is keyed by it

Dimension = Literal["logic", "grounding", "knowledge"]
DIMENSIONS: tuple[Dimension, ...] = get_args(Dimension)

MEANING: dict[Dimension, str] = {
    "logic": (
        "Does each step follow from the steps before it, and the conclusion from all of them? Judge the inference "
        "alone: a correct inference from a wrong observation is good logic, a right answer that follows from nothing "
        "is not."
    ),
    "grounding": (
        "Is what it says about the image really there, and does it look at what the question is about? Things that "
        "are not in the image, wrong readings and missing observations count against it."
    ),
    "knowledge": (
        "Are the facts, rules, formulas and calculations that it uses correct, and are they the ones that the "
        "question needs?"
    ),
}
BANDS = (
    "0 to 25: wrong, missing or about something else. 26 to 50: right in small parts. 51 to 75: mostly right, with a "
    "mistake or a gap that matters. 76 to 100: right, at most with slips that change nothing. Use the whole range."
)
# What the dimensions mean in a field. `general` adds nothing.
RUBRICS: dict[str, dict[Dimension, str]] = {
    "general": {},
    "mathematics": {
        "logic": "Check every transformation and that no case is skipped.",
        "grounding": "Figures, labels, axes and marked lengths or angles must be read off correctly.",
        "knowledge": "Check definitions and theorems, and redo the arithmetic.",
    },
    "science": {
        "logic": "The chain from observation through principle to conclusion must have no missing link.",
        "grounding": "Diagrams, arrows, maps and tables must be read as they are drawn.",
        "knowledge": "Check laws, terms, units and classifications against what is taught in school.",
    },
    "medicine": {
        "logic": "Findings must lead to the conclusion; other explanations must not be ruled out without a reason.",
        "grounding": "Modality, organ, side and the described finding must agree with the image.",
        "knowledge": "Check anatomy, pathology and terminology against accepted medical knowledge.",
    },
    "arts": {
        "logic": "Interpretations must be drawn from what was described, not only asserted.",
        "grounding": "Depicted things, composition, colours and technique must be those of the picture.",
        "knowledge": "Check artists, periods, styles and symbols.",
    },
    "documents": {
        "logic": "The step from the text that was found to the answer must be stated and must fit the question.",
        "grounding": "Quoted text, numbers and their places must be in the document, letter for letter.",
        "knowledge": "Check conventions of the kind of document: dates, units, totals, abbreviations.",
    },
    "finance": {
        "logic": "The stance must follow from the statements that are quoted, with opposing ones weighed.",
        "grounding": "Figures, dates and wording must be those of the material shown.",
        "knowledge": "Check economic terms and what raises or lowers what: rates, inflation, employment, prices.",
    },
}


def check_rubric(rubric: str) -> None:
    """Refuse what is neither the name of a rubric nor a sentence of the user's own. Raises `InputError`."""
    if rubric not in RUBRICS and " " not in rubric.strip():
        remedy = f"Known: {', '.join(RUBRICS)}; or a sentence that says what counts in this task"
        raise InputError(f"no such rubric: {rubric!r}", remedy=remedy)


def criteria(rubric: str, dimensions: tuple[Dimension, ...]) -> str:
    """A line a dimension, with what it means in the field that `rubric` names, or with the user's own sentence."""
    own = RUBRICS.get(rubric)
    lines = [f"{name}: {MEANING[name]} {(own or {}).get(name, '')}".rstrip() for name in dimensions]
    return "\n".join(lines if own is not None else [*lines, f"In this task: {rubric.strip()}"])
