"""Answer styles: the sentence that asks for each, the strict test of whether an answer has the form, and inference.

`parse` is strict and decides a verdict's `format_ok`; `extract` (of `extraction.py`) is style-free and decides
`content_ok`. Free text (`brief`, `detailed`, `caption`) is format-wrong only when empty, so that a scorer, not a word
count, judges it; `fits` is the structural test for those who need one (inference, ASD, generators).
"""

import re
import string
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple, get_args

from .answers import is_phrase, named_in, read_box, read_number, sentences, split_tags, strip_math
from .extraction import extract
from .schema import Reasoning, Style

__all__ = [
    "FORMAT",
    "STYLES",
    "THINK",
    "Parsed",
    "build_prompt",
    "closed_form",
    "default_scorer",
    "extract",
    "find_options",
    "fits",
    "infer_style",
    "parse",
    "split_prompt",
    "split_reasoning",
    "state_answer",
    "state_proposition",
]

STYLES: tuple[Style, ...] = get_args(Style)

# The sentence that asks for each style. `short` and `mcq` are CoIN's (code); SEFE's for the others are not published,
# so those are ours.
FORMAT: dict[Style, str] = {
    "short": "Answer the question using a single word or phrase.",
    "mcq": "Answer with the option's letter from the given choices directly.",
    "yes_no": "Answer with yes or no.",
    "brief": "Answer in one brief sentence.",
    "detailed": "Answer with a detailed explanation.",
    "number": "Answer with a number.",
    "bbox": "Answer with the bounding box [x1, y1, x2, y2].",
    "label": "Answer with one of the labels.",
    "latex": "Answer in LaTeX.",
    "caption": "Describe the image in one sentence.",
}
THINK = "Think first, then answer, in the form <think>...</think><answer>...</answer>."

# Format sentences, beside our own, that published data end their questions with: known when a prompt is taken apart.
_FOREIGN_FORMATS: dict[str, Style] = {
    "Answer the question with a single word or phrase.": "short",
    "Please answer the question using a single word or phrase.": "short",
    "Answer using a single word or phrase.": "short",
    "Answer with a single word or phrase.": "short",
    "Answer with the option letter from the given choices directly.": "mcq",
    "Answer with the letter of the correct option.": "mcq",
    "Please answer directly with only the letter of the correct option and nothing else.": "mcq",
    "Please select the correct answer from the options above.": "mcq",
    "Answer yes or no.": "yes_no",
    "Please answer yes or no.": "yes_no",
    "Please answer with yes or no.": "yes_no",
    "Answer the question with yes or no.": "yes_no",
    "Answer the question in one brief sentence.": "brief",
    "Answer in one sentence.": "brief",
    "Answer the question in detail.": "detailed",
}
_STYLE_OF_FORMAT = {sentence.lower(): style for style, sentence in FORMAT.items()} | {
    sentence.lower(): style for sentence, style in _FOREIGN_FORMATS.items()
}
_ENDINGS = [THINK.lower(), *_STYLE_OF_FORMAT]
_SCORER: dict[Style, str] = {
    "short": "short",
    "yes_no": "yes_no",
    "mcq": "mcq",
    "brief": "rouge_l",
    "detailed": "rouge_l",
    "number": "number",
    "label": "label",
    "latex": "latex",
    "caption": "caption",
    "bbox": "bbox",
}


class Parsed(NamedTuple):
    """The answer's value in its style's canonical form (`None` if the form is wrong), and whether it has that form."""

    value: str | None
    format_ok: bool


def build_prompt(
    question: str, style: Style, *, options: Sequence[str] | None = None, reasoning: Reasoning = "none"
) -> str:
    """The user turn: question, options `A. …` one a line, format sentence, and what asks for `<think>` if wanted."""
    lines = [question] if question else []
    lines += [f"{letter}. {option}" for letter, option in zip(string.ascii_uppercase, options or (), strict=False)]
    lines.append(f"{FORMAT[style]} {THINK}" if reasoning == "think" else FORMAT[style])
    return "\n".join(lines)


def split_prompt(text: str, known: Iterable[str] = ()) -> tuple[str, list[str] | None, str]:
    """Take a user turn apart into (question, option texts or `None`, format sentences).

    Sentences that ask for a format are dropped from the end: ours, those of published data, and `known` ones. What
    `build_prompt` built comes apart into what it was built of.
    """
    endings = sorted([*_ENDINGS, *(ending.lower() for ending in known if ending)], key=len, reverse=True)
    question, dropped = text.rstrip(), []
    while True:
        tail = question[-len(endings[0]) :].lower()
        ending = next((ending for ending in endings if tail.endswith(ending)), None)
        if ending is None:
            break
        dropped.append(question[len(question) - len(ending) :])
        question = question[: -len(ending)].rstrip()
    question, options = find_options(question)
    return question, options, " ".join(reversed(dropped))


def find_options(text: str) -> tuple[str, list[str] | None]:
    """Split a text into what comes before its options and their texts, if it ends in lettered options from A on.

    One option a line (`A. red`, `(A) red`, `A) red`, `A: red`) or all in one line (`… it? (A) red (B) blue`), where
    the question has ended before them: in "between (A) and (B)?" there are none.
    """
    lines = text.rstrip().split("\n")
    options: list[str] = []
    for line in reversed(lines):
        match = re.fullmatch(r"\s*(?:\(([A-Z])\)|([A-Z])[.):])\s*(\S.*)", line)
        if not match:
            break
        options.insert(0, match.group(3).strip())
        if (match.group(1) or match.group(2)) == "A":
            break
    letters = [re.match(r"\s*\(?([A-Z])", line) for line in lines[len(lines) - len(options) :]]
    if len(options) >= 2 and [m.group(1) for m in letters if m] == list(string.ascii_uppercase[: len(options)]):
        question = "\n".join(lines[: len(lines) - len(options)]).rstrip()
        return re.sub(r"\n(?:Options|Choices)\s*:?$", "", question), options
    pieces = re.split(r"\s*\(([A-Z])\)\s*", text.rstrip())
    ended = re.search(r"(?:^|[.?!:\n]|\b(?:Options|Choices))[ \t]*$", text.partition("(A)")[0])
    named = not any(re.fullmatch(r"[?.!,;:\s]*", piece) for piece in pieces[2::2])
    if len(pieces) >= 5 and pieces[1::2] == list(string.ascii_uppercase[: len(pieces) // 2]) and ended and named:
        return re.sub(r"\s*(?:Options|Choices)\s*:?$", "", pieces[0]).rstrip(), [
            piece.strip() for piece in pieces[2::2]
        ]
    return text, None


def split_reasoning(response: str, reasoning: Reasoning) -> tuple[str | None, str, bool]:
    """Split a response into (thinking, answer, whether the form is the one asked for).

    `think` asks for exactly one `<think>…</think>` and then one `<answer>…</answer>`, neither empty; `none` for no
    such tag. A response in the other form is still split, so that its answer can be read.
    """
    think, answer = split_tags(response)
    tags = re.findall(r"</?(?:think|answer)>", response)
    if reasoning == "none":
        return think, answer, not tags
    in_order = tags == ["<think>", "</think>", "<answer>", "</answer>"] and think and answer
    shape = r"\s*<think>.*?</think>\s*<answer>.*?</answer>\s*"
    return think, answer, bool(in_order and re.fullmatch(shape, response, re.DOTALL))


def parse(style: Style, answer: str, *, options: Sequence[str] | None = None) -> Parsed:
    """Whether an answer has the form its style asks for, and its value in canonical form.

    - mcq: one letter, of either case, maybe with a parenthesis or full stop, and among the options -> capital letter.
    - yes_no: yes or no in any case, maybe with a full stop -> `yes` / `no`.
    - number: one number and nothing else but a currency sign, a percent sign or a full stop -> without commas and
      currency.
    - bbox: `[x1, y1, x2, y2]` with 0 <= x1 < x2, 0 <= y1 < y2. The unit (0-1, pixels, 0-1000) is the data's: the form
      is the same, and a box in another unit than the reference's does not overlap it.
    - label: one of `options`; without options, as short.
    - short: a phrase (`answers.is_phrase`): one line, no sentence, box or lettered option -> without the full stop.
    - latex: one formula, braces balanced, no prose around it -> without delimiters.
    - brief, detailed, caption: any text.
    """
    value = _value(style, answer.strip(), list(options or []))
    return Parsed(value, value is not None)


def closed_form(answer: str) -> Style | None:
    """`yes_no` for a bare yes or no, `mcq` for a bare capital letter, else `None`."""
    if _value("yes_no", answer.strip(), []):
        return "yes_no"
    return "mcq" if re.fullmatch(r"\(?[A-Z]\)?[.:]?", answer.strip()) else None


def fits(style: Style, answer: str, *, options: Sequence[str] | None = None) -> bool:
    """`parse(…).format_ok`, and for free text its shape: `brief` and `caption` one sentence of three words or more,
    `detailed` two sentences or fifteen words."""
    answer = answer.strip()
    match style:
        case "brief" | "caption":
            return len(sentences(answer)) == 1 and len(answer.split()) >= 3
        case "detailed":
            return len(sentences(answer)) >= 2 or len(answer.split()) >= 15
        case _:
            return parse(style, answer, options=options).format_ok


def _value(style: Style, text: str, options: list[str]) -> str | None:
    match style:
        case "mcq":
            letter = re.fullmatch(r"\(?([A-Za-z])\)?[.:]?", text)
            allowed = string.ascii_uppercase[: len(options) or 26]
            return letter.group(1).upper() if letter and letter.group(1).upper() in allowed else None
        case "yes_no":
            word = text.removesuffix(".").lower()
            return word if word in ("yes", "no") else None
        case "number":
            number = read_number(text)
            return number and number + "%" * ("%" in text)
        case "bbox":
            box = read_box(text.removesuffix("."))
            return f"[{', '.join(box)}]" if box else None
        case "label" if options:
            place = named_in(options, text)
            return None if place is None else options[place]
        case "short" | "label":
            return (text.removesuffix(".").rstrip() or text) if is_phrase(text) else None
        case "latex":
            formula = strip_math(text)
            prose = re.search(
                r"\b[A-Za-z]{2,}(?:\s+[A-Za-z]{2,}){2}", re.sub(r"\\[a-z]+\s*(?:\{[^{}]*\})?", "", formula)
            )
            balanced = formula.count("{") == formula.count("}") and "$" not in formula
            return formula if formula and balanced and not prose else None
        case _:
            return text or None


def infer_style(completions: Sequence[str], prompts: Sequence[str]) -> Style:
    """The style of a task, from its answers (without thinking) and user turns; both must not be empty.

    A format sentence that at least nine of ten prompts end with decides. Otherwise the answers do: the first style, in
    the order below, whose form 95 % of them have.
    """
    asked = Counter(_asked_style(prompt) for prompt in prompts)
    named, count = asked.most_common(1)[0]
    if named and count >= 0.9 * len(prompts):
        return named

    def most(fit: Iterable[bool]) -> bool:
        return sum(fit) >= 0.95 * len(completions)

    if most(split_prompt(prompt)[1] is not None for prompt in prompts) and most(
        fits("mcq", answer) for answer in completions
    ):
        return "mcq"
    closed: tuple[Style, ...] = ("yes_no", "bbox", "number")
    for style in closed:
        if most(fits(style, answer) for answer in completions):
            return style
    if most(fits("latex", answer) and bool(re.search(r"\\[a-z]|\$|\^|_\{", answer)) for answer in completions):
        return "latex"
    if most(fits("short", answer) for answer in completions):
        return "short"
    if most(fits("brief", answer) for answer in completions):
        captions = sum(bool(re.search(r"\b(?:describe|caption|description)\b", p, re.I)) for p in prompts)
        return "caption" if captions >= 0.9 * len(prompts) else "brief"
    return "detailed"


def _asked_style(prompt: str) -> Style | None:
    """The style that the last known format sentence of a prompt asks for."""
    text = prompt.rstrip()
    if text.endswith(THINK):
        text = text.removesuffix(THINK).rstrip()
    return next((style for sentence, style in _STYLE_OF_FORMAT.items() if text.lower().endswith(sentence)), None)


def default_scorer(style: Style, references: int = 1) -> str:
    """The kind of scorer for a style whose samples have `references` accepted answers each.

    Ten or more short ones are human annotations, scored as VQA does (`vqa_soft`).
    """
    return "vqa_soft" if style == "short" and references >= 10 else _SCORER[style]


def state_answer(answer: str) -> str:
    """An answer as a brief sentence: how rules write the `brief` style, and how the tiny model learned it."""
    return f"The answer is {answer}."


def state_proposition(question: str, candidate: str) -> str:
    """A question and a candidate answer as a yes/no question."""
    return f'{question}\nIs "{candidate}" the right answer?'
