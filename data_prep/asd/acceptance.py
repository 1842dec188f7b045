"""What of a converting model's reply is good enough to train on. Everything else is `Unreachable`, with its reason.

The tests are on words: they find replies that are empty, of another form, equal to a right answer, or that lose it.
They cannot know that two different words mean the same, nor what the image shows.
"""

import json
import re
from typing import Any

from ..answers import normalise, sentences
from ..extraction import extract
from ..schema import Style
from .distractors import answer_kind, same_answer
from .turns import Turn, Unreachable

# Words. About 20 and about 50 are asked for (SEFE's lengths); what is half or twice as long is another style.
_LENGTHS: dict[Style, tuple[int, int]] = {"brief": (8, 40), "detailed": (25, 100)}
_REFUSAL = re.compile(r"(?i)\b(?:i[’']?m sorry|i am sorry|i can(?:not|[’']t)|i am (?:not able|unable)|as an ai)\b")
_OFF_STAGE = re.compile(r"(?i)\b(?:given|provided|reference|supplied) answer\b|\byou (?:gave|provided)\b")
_MARKUP = re.compile(r"</?(?:think|answer|image|video|img)>|<\|")  # would be read as structure, in training or scoring
_NEGATIONS = {"not", "never", "isn't", "aren't", "wasn't", "weren't", "than", "without", "cannot"}
_WORD_FOR_WORD = 4  # an answer of more words may be inflected into a sentence
_KEPT = 0.75  # of a long answer's words
_SHARED = 0.4  # of the longer words of the shorter of two free texts
LONGEST_OPTION = 40  # words


def read_reply(text: str, keys: list[str]) -> list[str]:
    """The strings under `keys` of a reply that is one JSON object (a code fence or prose around it is forgiven)."""
    if not text.strip():
        raise Unreachable("the reply is empty")
    if _REFUSAL.search(text) and "{" not in text:
        raise Unreachable("the model refused")
    start, end = text.find("{"), text.rfind("}")
    try:
        value: Any = json.loads(text[start : end + 1])
        found = [value[key] for key in keys]
    except (ValueError, LookupError, TypeError):
        raise Unreachable("the reply is not the JSON asked for") from None
    if not all(isinstance(item, str) for item in found):
        raise Unreachable("the reply is not the JSON asked for")
    texts = [" ".join(item.split()) for item in found]
    if not all(texts):
        raise Unreachable("the reply is empty")
    if any(_REFUSAL.search(item) for item in texts):
        raise Unreachable("the model refused")
    if any(_MARKUP.search(item) for item in texts):
        raise Unreachable("the reply holds markup")
    return texts


def accept_wrong(texts: list[str], turn: Turn) -> list[str]:
    """Wrong answers, written like the right one, that differ from every right answer and from each other."""
    right, chosen = turn.references[0], list[str]()
    for text in texts:
        said = text.strip("\"'“”").strip()
        option = _written_like(right, said)
        if not re.search(r"\w", said):
            raise Unreachable("the reply is empty")
        if any(same_answer(option, reference) for reference in turn.references):
            raise Unreachable("a wrong answer means the same as the right one")
        if any(same_answer(option, other) for other in chosen):
            raise Unreachable("two wrong answers mean the same")
        if not _same_form(said, turn):
            raise Unreachable("a wrong answer has another form than the right one")
        chosen.append(option)
    return chosen


def accept_explanation(text: str, turn: Turn, style: Style) -> str:
    """An explanation of the length asked for that says what the gold answer says."""
    low, high = _LENGTHS[style]
    words = len(text.split())
    if not low <= words <= high:
        raise Unreachable(f"the explanation is too {'short' if words < low else 'long'}")
    if style == "brief" and len(sentences(text)) != 1:
        raise Unreachable("the brief explanation is not one sentence")
    if _OFF_STAGE.search(text):
        raise Unreachable("the explanation speaks of the answer it was given")
    if turn.kind is None and turn.style != "mcq":
        _check_shared_words(text, turn.references[0])
        return text
    said = [_says(text, reference, turn) for reference in turn.references]
    if True not in said:
        contradicts = False in said
        raise Unreachable("the explanation " + ("contradicts the answer" if contradicts else "does not say the answer"))
    return text


def _same_form(option: str, turn: Turn) -> bool:
    """Whether nothing but its meaning tells an option from the right answer: not its kind, and hardly its length."""
    right, words = turn.references[0], len(option.split())
    if turn.kind is None:
        size = len(right.split())
        return size / 3 <= words <= 3 * size and len(sentences(option)) == len(sentences(right))
    fits = answer_kind(option, turn.style) == turn.kind
    return fits and words <= 2 * len(right.split()) + 3


def _written_like(right: str, option: str) -> str:
    """The option with the right answer's full stop and first letter's case, which must not give it away."""
    option = option.rstrip(".") + "." if right.endswith(".") else option.removesuffix(".")
    first, rest = option[:1], option[1:]
    if right[:1].islower() and rest == rest.lower():
        first = first.lower()
    elif right[:1].isupper():
        first = first.upper()
    return first + rest


def _says(text: str, answer: str, turn: Turn) -> bool | None:
    """Whether a text says an answer (True), says the contrary (False), or does not speak of it (None)."""
    match turn.kind:
        case "yes_no":
            polarity = extract("yes_no", text)
            return None if polarity is None else polarity == normalise(answer)
        case "bbox" | "latex":
            return re.sub(r"[\s$]", "", answer) in re.sub(r"[\s$]", "", text) or None
    wanted, words = _stems(answer), _stems(text)
    if len(wanted) > _WORD_FOR_WORD:
        return len(set(wanted) & set(words)) >= _KEPT * len(set(wanted)) or None
    places = [i for i in range(len(words)) if words[i : i + len(wanted)] == wanted]
    if not places:
        return None
    return any(not _NEGATIONS.intersection(words[max(0, place - 1) : place]) for place in places)


def _check_shared_words(text: str, answer: str) -> None:
    """A free text told shorter or longer has words in common with what it was told from."""
    one, other = ({word for word in _stems(part) if len(word) > 3} for part in (text, answer))
    if len(one & other) < _SHARED * min(len(one), len(other)):
        raise Unreachable("the explanation does not say the answer")


def _stems(text: str) -> list[str]:
    return [word.removesuffix("s") for word in normalise(text).split()]
