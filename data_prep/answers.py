"""What an answer says, whatever its form: normalising, telling a sentence from a phrase, style-free extraction."""

import re
import string
import unicodedata
from collections.abc import Sequence

from .schema import Style

_UNITS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
).split()
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
NUMBER_WORDS = {word: value for value, word in enumerate(_UNITS)} | {
    word: 20 + 10 * value for value, word in enumerate(_TENS)
}
_ARTICLES = {"a", "an", "the"}
_TOKEN = re.compile(r"(?<!\w)[-+]?\d[\d,]*(?:\.\d+)?|[^\W_]+(?:['’][^\W_]+)*")

# Digits that belong to a name ("Figure2", "x1", "bbox_2d"), a fraction or a version are not numbers, and the minus of
# "5-3" is no sign.
_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:[eE][-+]?\d+)?|\.\d+"
_NUMBER_IN_TEXT = re.compile(rf"(?<![\w./])(?:(?<![)\]])[-+])?(?:{_DIGITS})(?!\d|/\d|\.\d)")
_NUMBER = re.compile(rf"[$€£]?\s?([-+]?(?:{_DIGITS}))\s?%?\.?")
_COORDINATE = r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)"  # a comma separates here, it groups no thousands
_BOX_IN_TEXT = re.compile(r"\[\s*" + r"\s*,\s*".join([rf"({_COORDINATE})"] * 4) + r"\s*\]")
_COORDINATE_IN_TEXT = re.compile(rf"(?<![\w./]){_COORDINATE}(?![\w/])")

_SUBJECTS = set(
    "the this that these those it its it's there there's here he he's she she's they they're we i you a an in on at "
    "yes no my his her their our your one both all some that's here's what's".split()
)
_VERBS = set(
    "is are was were am isn't aren't wasn't weren't has have had shows show depicts depict contains contain reads "
    "read says say displays display can could will would should does do did seems seem appears appear looks look "
    "equals equal it's there's he's she's that's they're here's".split()
)
_ABBREVIATIONS = set("st mr mrs ms dr jr sr no vs mt ft inc co ltd prof gen col etc e.g i.e a.m p.m u.s d.c".split())
_ANSWER_IS = re.compile(
    r"(?:\b(?:answer|result|solution|option|choice)\b(?:\s+(?:to|for|of)\b[^.:\n]{0,80}?)?"
    r"(?:\s+(?:is|are|was|should be|would be|must be)\b\s*:?|\s*[:=])|####)\s*",
    re.IGNORECASE,
)
_LETTERED = re.compile(r"(?:\([A-Z]\)|[A-Z][).:])\s+(?=[a-z0-9])")  # "B. red", but not "C. S. Lewis"
_VERB_AFTER_SUBJECT = re.compile(
    r"(?:\s+(?:is|are|was|were|has|have|shows?|depicts?|contains?|reads?|says?|displays?|equals)\s|['’]s\s)",
    re.IGNORECASE,
)
_YES = {"yes", "yeah", "yep", "true", "correct"}
_NO = {"no", "nope", "false", "incorrect"}


def normalise(text: str) -> str:
    """Comparable form of an answer: no case, articles, punctuation or thousands separators; number words as digits.

    An answer of symbols alone stays itself, so that no two different answers become the same empty string.
    """
    text = unicodedata.normalize("NFKC", text).replace("−", "-").casefold().strip()
    tokens = [token.replace(",", "").replace("’", "'") for token in _TOKEN.findall(text)]
    kept = [str(NUMBER_WORDS.get(token, token)) for token in tokens if token not in _ARTICLES]
    return " ".join(kept) or " ".join(tokens) or text


def sentences(text: str) -> list[str]:
    """Split a text at line breaks and at `.`, `!`, `?` followed by white space, but not after `St.` or an initial."""
    parts, start = [], 0
    for match in re.finditer(r"[.!?]+(?=\s)|\n+", text):
        before = text[max(start, match.start() - 20) : match.start()].split()
        last = before[-1].lstrip("(\"'").lower() if before else ""
        initial = len(last) == 1 and last.isalpha() and match.group() == "."
        if match.group()[0] != "\n" and (last in _ABBREVIATIONS or initial):
            continue
        parts.append(text[start : match.end()].strip())
        start = match.end()
    return [part for part in [*parts, text[start:].strip()] if part]


def is_sentence(text: str) -> bool:
    """Whether a text reads as a sentence, not as a phrase: a subject with a verb, or seven words with a full stop."""
    parts = [word.strip("\"'(),.;:!?").lower().replace("’", "'") for word in text.split()]
    if parts and len(parts) + ("'" in parts[0]) >= 3 and parts[0] in _SUBJECTS and not _VERBS.isdisjoint(parts):
        return True
    return len(parts) > 6 and text.rstrip().endswith((".", "!", "?"))


def is_phrase(text: str) -> bool:
    """Whether a text is a word or phrase: one line of at most 15 words (titles and lists are phrases too, as OCR-VQA's
    answers show), and no sentence, box, "answer: …", lettered option or tagged answer."""
    other_form = is_sentence(text) or _BOX_IN_TEXT.fullmatch(text) or _LETTERED.match(text) or _ANSWER_IS.search(text)
    tagged = re.search(r"</?(?:think|answer)>", text)
    return 0 < len(text.split()) <= 15 and "\n" not in text and not other_form and not tagged


def read_box(text: str) -> list[str] | None:
    """The four numbers, as written, of a text that is `[x1, y1, x2, y2]`, with x1 < x2, y1 < y2 and none negative."""
    match = _BOX_IN_TEXT.fullmatch(text.strip())
    return _ordered_box(list(match.groups())) if match else None


def read_number(text: str) -> str | None:
    """The number a text consists of (a currency sign, a percent sign or a full stop may stand by), without commas."""
    match = _NUMBER.fullmatch(text.strip().replace("−", "-"))
    return match.group(1).replace(",", "").removeprefix("+") if match else None


def split_tags(response: str) -> tuple[str | None, str]:
    """Split `<think>…</think><answer>…</answer>` leniently into (thinking, answer).

    The last complete `<answer>` counts; an unclosed one runs to the end; without one, what follows `</think>` is the
    answer; a response that ends inside its thinking has none. Text without tags is all answer.
    """
    end = response.rfind("</answer>")
    start = response.rfind("<answer>", 0, max(end, 0))
    if start >= 0:
        before, answer = response[:start], response[start + len("<answer>") : end]
    elif "<answer>" in response:
        before, _, answer = response.rpartition("<answer>")
    elif "</think>" in response:
        before, _, answer = response.rpartition("</think>")
    elif "<think>" in response:
        before, answer = response, ""
    else:
        return None, response.strip()
    think = re.sub(r"</?(?:think|answer)>", "", before).strip()
    return think or None, answer.strip()


def strip_math(text: str) -> str:
    """Drop the delimiters around a formula: `$…$`, `$$…$$`, `\\(…\\)`, `\\[…\\]`, and a full stop after them."""
    text = text.strip().rstrip(".").strip()
    for left, right in (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]")):
        if len(text) > len(left + right) and text.startswith(left) and text.endswith(right):
            return text[len(left) : -len(right)].strip()
    return text


def extract(style: Style, answer: str, *, options: Sequence[str] | None = None) -> str | None:
    """The best reading of what an answer says, whatever form it has; `None` where it says nothing the style can mean.

    `options` are the texts of an mcq's options (in letter order) or the labels of a label task. The result has the
    form of `style`: a capital letter, `yes`/`no`, a bare number, `[x1, y1, x2, y2]`, a word or phrase, or, for free
    text, the text without tags. An empty answer is `None`, never something that a gold answer could contain.
    """
    text = _core(answer)
    if not text:
        return None
    match style:
        case "mcq":
            return _letter(text, list(options or []))
        case "yes_no":
            return _polarity(text)
        case "number":
            return _number(text)
        case "bbox":
            box = _box(text)
            return f"[{', '.join(box)}]" if box else None
        case "label":
            return (_named_option(text, list(options)) if options else None) or _phrase(text)
        case "short":
            return _phrase(text)
        case "latex":
            return _formula(text)
        case _:
            return text


def _core(answer: str) -> str:
    """The answer without thinking, tags, `\\boxed{}`, emphasis and quotes around the whole."""
    text = split_tags(answer)[1]
    start = text.rfind(r"\boxed{")
    if start >= 0:
        depth, inside = 1, text[start + len(r"\boxed{") :]
        for position, character in enumerate(inside):
            depth += {"{": 1, "}": -1}.get(character, 0)
            if depth == 0:
                text = inside[:position]
                break
    text = re.sub(r"\*\*|__|`", "", text).strip()
    if len(text) > 1 and text[0] + text[-1] in ('""', "''", "“”"):
        text = text[1:-1].strip()
    return text


def _answer_clause(text: str) -> str | None:
    """What follows the last "answer is" / "answer:" up to the end of that sentence."""
    matches = [match for match in _ANSWER_IS.finditer(text) if text[match.end() :].strip()]
    if not matches:
        return None
    return sentences(text[matches[-1].end() :])[0].rstrip(".!").strip(" \"'“”")


def _phrase(text: str) -> str | None:
    """The word or phrase that an answer is, or states in a sentence ("The digit is 7." -> "7")."""
    if is_phrase(text):
        return text.rstrip(".").rstrip() or None
    clause = _answer_clause(text)
    if clause is None:
        clause = sentences(text)[0]
        if is_sentence(clause):
            clause = _predicate(clause)
    clause = _LETTERED.sub("", clause, count=1)
    return re.sub(r"^(?:a|an|the)\s+(?=\S)", "", clause.rstrip(".!").strip(" \"'“”")) or None


def _predicate(sentence: str) -> str:
    """What a sentence says of its subject; a verb inside "that is …" is not the sentence's own."""
    for match in _VERB_AFTER_SUBJECT.finditer(sentence):
        before = sentence[max(0, match.start() - 20) : match.start()].split()
        if before and before[-1].lower() not in {"that", "which", "who"} and sentence[match.end() :].strip():
            return sentence[match.end() :]
    return sentence


def _letter(text: str, options: list[str]) -> str | None:
    """The option letter an answer gives or whose text it names; `None` where two different ones are as likely."""
    allowed = string.ascii_uppercase[: len(options) or 26]

    def only(found: list[str]) -> str | None:
        letters = {letter.upper() for letter in found if letter.upper() in allowed}
        return letters.pop() if len(letters) == 1 else None

    alone = re.fullmatch(r"[(\[]?([A-Za-z])[)\]]?[.:,]?", text)
    if alone:
        return only([alone.group(1)])
    exact = [allowed[i] for i, option in enumerate(options) if normalise(option) == normalise(text)]
    if exact:
        return only(exact)
    leading = re.match(
        r"(?:[(\[]([A-Za-z])[)\]][.:]?|([A-Za-z])[).:])(?:\s|$)|([A-Z])\s*(?:,|[-–]\s|is\b|because\b)", text
    )
    if leading and (letter := only([group for group in leading.groups() if group])):
        return letter
    clause = _answer_clause(text)
    for part in [clause, text] if clause else [text]:
        start = re.match(r"(?:(?:option|choice|letter)\s+)?[(\[]?([A-Z])[)\]]?(?=$|[\s.,:;)])", part, re.ASCII)
        if part is clause and start and (letter := only([start.group(1)])):
            return letter
        if part is clause and re.fullmatch(r"[(\[]?[a-z][)\]]?", part):
            return only([part.strip("()[]")])
        named = _named_option(part, options)
        if named is not None:
            return allowed[options.index(named)]
    for pattern in (
        r"\b(?:[Oo]ption|[Cc]hoice|[Ll]etter|[Aa]nswer)\s+[(\[\"']?([A-Z])\b",
        r"\(([A-Z])\)",
        r"(?<![\w'’.])((?!(?:A|I)\s+(?!or\b|and\b)[a-z])[A-Z])(?![\w'’]|\.\w)",  # not the words "A" and "I"
    ):
        found = re.findall(pattern, text)
        if found:
            return only(found)
    return None


def _named_option(text: str, options: list[str]) -> str | None:
    """The one option whose text occurs in `text` as whole words; a longer option hides those inside it."""
    rest, found = normalise(text), []
    for option in sorted(options, key=lambda option: -len(normalise(option))):
        pattern = rf"(?<![\w.-]){re.escape(normalise(option))}(?![\w]|\.\d)"
        if normalise(option) and re.search(pattern, rest):
            found.append(option)
            rest = re.sub(pattern, "\0", rest)
    return found[0] if len(found) == 1 else None


def _polarity(text: str) -> str | None:
    """`yes` or `no`: the leading word, else what "the answer is" says, else the only such word in the text."""
    clause = _answer_clause(text)
    for part in [text, clause] if clause else [text]:
        first = re.match(r"[^\w]*(\w+)", part)
        if first and first.group(1).lower() in _YES | _NO:
            return "yes" if first.group(1).lower() in _YES else "no"
    said = {"yes" if word in _YES else "no" for word in re.findall(r"\w+", text.lower()) if word in _YES | _NO}
    return said.pop() if len(said) == 1 else None


def _number(text: str) -> str | None:
    """The number stated as the answer, else the result of a calculation, else the last number; parentheses aside."""
    text = text.replace("−", "-")
    if _BOX_IN_TEXT.fullmatch(text):
        return None
    clause = _answer_clause(text)
    for part, position in ((clause, 0), (text, -1)) if clause else ((text, -1),):
        plain = re.sub(r"\([^()]*\)", lambda m: " " if re.search("[A-Za-z]", m[0]) else m[0], part)  # "(see Figure 2)"
        if position == 0 and "=" in plain:
            plain = plain[plain.rindex("=") + 1 :]
        found = _NUMBER_IN_TEXT.findall(plain)
        if found:
            return found[position].replace(",", "").removeprefix("+")
        spelled = [NUMBER_WORDS[word] for word in re.findall(r"[a-z]+", plain.lower()) if word in NUMBER_WORDS]
        if spelled:
            return str(_spelled(plain, position))
    return None


def _spelled(text: str, position: int) -> int:
    """The first (0) or last (-1) number written in words, "twenty-one" included."""
    values: list[int] = []
    joined = False
    for word in re.findall(r"[a-z]+|[^a-z\s]", text.lower()):
        value = NUMBER_WORDS.get(word)
        if value is None:
            joined = word == "-" and joined
            continue
        if joined and value < 10:
            values[-1] += value
        else:
            values.append(value)
        joined = value >= 20
    return values[position]


def _box(text: str) -> list[str] | None:
    """The first bracketed list of four numbers, else the first four numbers of the text."""
    match = _BOX_IN_TEXT.search(text)
    return _ordered_box(list(match.groups()) if match else _COORDINATE_IN_TEXT.findall(text)[:4])


def _ordered_box(numbers: list[str]) -> list[str] | None:
    if len(numbers) != 4:
        return None
    x1, y1, x2, y2 = map(float, numbers)
    return numbers if 0 <= x1 < x2 and 0 <= y1 < y2 else None


def _formula(text: str) -> str | None:
    """The last delimited formula, else what "the answer is" states, else the text."""
    found = re.findall(r"\$\$.+?\$\$|\$[^$]+\$|\\\(.+?\\\)|\\\[.+?\\\]", text, re.DOTALL)
    return strip_math(found[-1] if found else _answer_clause(text) or text) or None
