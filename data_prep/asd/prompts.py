"""What the converting model is asked, and in which form it has to answer. The words are ours.

The gold answer is always given: the model writes around it and is never asked what it sees as an open question. Every
answer is a JSON object whose keys the schema fixes; plain string properties are what all guided decoders know.
"""

from collections.abc import Sequence

from ..endpoint import Prompt
from ..schema import Style
from .turns import Job, Turn

VERSION = 1  # raise it with any change of the words below: provenance names it, cached answers are keyed by it

_SYSTEM = (
    "You help to write training data for models that answer questions about images. You get a question and its "
    "correct answer, which people have checked: take it as true. Reply with the JSON object asked for, nothing else."
)
_MORE_WRONG = (
    "Write three wrong answers for a multiple-choice test. Each must be wrong here, yet plausible to someone who has "
    "not looked closely; they must differ clearly from each other."
)
_ONE_WRONG = "Write one wrong answer. It must be wrong here, yet plausible to someone who has not looked closely."
_LIKE = (
    "No wrong answer may mean the same as the correct one, be a broader or narrower word for it, or differ from it in "
    "spelling only. Write them as the correct answer is written: same kind of thing, similar length, same "
    "capitalisation, no letters or numbering before them."
)
_WORDS: dict[Style, str] = {
    "brief": "in one sentence of about 20 words",
    "detailed": "in two to four sentences, about 50 words in all",
}


def ask_wrong(job: Job, count: int) -> Prompt:
    """Ask for `count` (1 or 3) wrong answers: the keys `wrong_1`, …"""
    task = _ONE_WRONG if count == 1 else _MORE_WRONG
    return _prompt(job, f"{task} {_LIKE}", [f"wrong_{i}" for i in range(1, count + 1)])


def ask_explanation(job: Job) -> Prompt:
    """Ask for a brief or detailed answer that explains the gold one: the key `explanation`."""
    turn, words = job.turn, _WORDS[job.style]
    shows = "what in the image shows it" if job.images else "what in the question leads to it"
    if turn.kind is None and turn.style != "mcq":
        task = f"Rewrite the correct answer {words}. Keep what it says, and add only {shows}."
    elif turn.kind == "bbox":
        task = f"Answer the question {words}: give the box exactly as it is, and describe what is inside it."
    elif turn.kind == "yes_no":
        task = f"Answer the question {words}, beginning with {turn.references[0].capitalize()}, and say {shows}."
    else:
        task = f"Answer the question {words}: state the correct answer word for word, and say {shows}."
    return _prompt(job, f"{task} Do not mention that an answer was given to you.", ["explanation"])


def _prompt(job: Job, task: str, keys: Sequence[str]) -> Prompt:
    turn, lines = job.turn, []
    for earlier in job.turns[: job.position]:
        lines += [f"Earlier question: {_question(earlier)}", f"Its answer: {earlier.answer}"]
    lines += [f"Question: {_question(turn)}", f"Correct answer: {turn.references[0]}"]
    if others := list(dict.fromkeys(other for other in turn.references[1:] if other != turn.references[0])):
        lines.append(f"Also correct: {'; '.join(others)}")
    schema = {
        "type": "object",
        "properties": {key: {"type": "string"} for key in keys},
        "required": list(keys),
        "additionalProperties": False,
    }
    return Prompt(_SYSTEM, "\n".join([*lines, "", task, f"JSON keys: {', '.join(keys)}."]), schema)


def _question(turn: Turn) -> str:
    if not turn.options:
        return turn.question
    return "\n".join([turn.question, *(f"- {option}" for option in turn.options)])
