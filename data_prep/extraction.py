"""What an answer says, whatever its form: style-free extraction."""

import re
import string
from collections.abc import Sequence

from .answers import (
    ANSWER_IS,
    BOX_IN_TEXT,
    COORDINATE,
    DASHES,
    DIGITS,
    LETTERED,
    NUMBER_WORDS,
    SCALE_WORDS,
    is_phrase,
    is_sentence,
    named_in,
    normalise,
    ordered_box,
    sentences,
    split_tags,
    strip_math,
)
from .schema import Style

# Digits that belong to a name ("Figure2", "x1", "bbox_2d"), a date or a version are not numbers, and the minus of "5-3"
# is no sign. What scales a number belongs to it: "3/4", "50 %", "3 million".
_NUMBER_IN_TEXT = re.compile(
    rf"(?<![\w./])(?:(?<![)\]])[-+])?(?:\d+/0*[1-9]\d*|{DIGITS})(?!\d|/\d|\.\d)"
    rf"(?:\s?%|\s(?:percent|{'|'.join(SCALE_WORDS)})\b)?"
)
_FRACTION = re.compile(r"\\[dt]?frac\{(\d+)\}\{(\d+)\}")
_GROUPED = re.compile(r"(?<=\d)[\u00a0\u2009\u202f](?=\d{3}(?!\d))")  # a thin space between thousands
_SIGN_WORD = re.compile(r"(?<![\d)]\s)\b(?:minus|negative)\s+(?=[$€£]?\d)", re.IGNORECASE)
_CURRENCY = re.compile(r"[$€£]\s?(?=[-+]?[\d.])")
_FOUR = re.compile(r"(?<![\w./])" + r"\s*,\s*".join([rf"({COORDINATE})"] * 4) + r"(?![\w/])")
_COORDINATE_IN_TEXT = re.compile(rf"(?<![\w./]){COORDINATE}(?![\w/])")
_FORMULA = re.compile(r"\$\$.+?\$\$|\$[^$]+\$|\\\(.+?\\\)|\\\[.+?\\\]", re.DOTALL)
_VERB_AFTER_SUBJECT = re.compile(
    r"(?:\s+(?:is|are|was|were|has|have|shows?|depicts?|contains?|reads?|says?|displays?|equals)\s|['’]s\s)",
    re.IGNORECASE,
)
_NEGATION = re.compile(r"not|never|cannot|\w+n['’]t")
_YES = {"yes", "yeah", "yep", "true", "correct"}
_NO = {"no", "nope", "false", "incorrect"}


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
            labels = list(options or [])
            place = _named_option(text, labels)
            return _phrase(text) if place is None else labels[place]
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
    matches = [match for match in ANSWER_IS.finditer(text) if text[match.end() :].strip()]
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
    clause = LETTERED.sub("", clause, count=1)
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
    if (place := named_in(options, text)) is not None:
        return allowed[place]
    if clause := _answer_clause(text):
        if (place := named_in(options, clause)) is not None:
            return allowed[place]
        start = re.match(r"(?:(?:option|choice|letter)\s+)?[(\[]?([A-Z])[)\]]?(?=$|[\s.,:;)])", clause, re.ASCII)
        if start and (letter := only([start.group(1)])):
            return letter
        if re.fullmatch(r"[(\[]?[a-z][)\]]?", clause):
            return only([clause.strip("()[]")])
        if (place := _named_option(clause, options)) is not None:
            return allowed[place]
    leading = re.match(
        r"(?:[(\[]([A-Za-z])[)\]][.:]?|([A-Za-z])[).:])(?:\s|$)|([A-Z])\s*(?:,|[-–]\s|is\b|because\b)", text
    )
    if leading and (letter := only([group for group in leading.groups() if group])):
        return letter
    if (place := _named_option(text, options)) is not None:
        return allowed[place]
    for pattern in (
        r"\b(?:[Oo]ption|[Cc]hoice|[Ll]etter|[Aa]nswer)\s+[(\[\"']?([A-Z])\b",
        r"\(([A-Z])\)",
        r"(?<![\w'’.])((?!(?:A|I)\s+(?!or\b|and\b)[a-z])[A-Z])(?![\w'’]|\.\w)",  # not the words "A" and "I"
    ):
        found = re.findall(pattern, text)
        if found:
            return only(found)
    return None


def _named_option(text: str, options: list[str]) -> int | None:
    """The one option whose text occurs in `text` as whole words, as it is written or else up to `normalise`, if that
    tells the options apart."""
    written = _occurring(text.casefold(), [option.casefold() for option in options])
    if written or len({normalise(option) for option in options}) < len(options):
        return written[0] if len(written) == 1 else None
    found = _occurring(normalise(text), [normalise(option) for option in options])
    return found[0] if len(found) == 1 else None


def _occurring(text: str, options: list[str]) -> list[int]:
    """Which options occur in `text` as whole words; a longer option hides those inside it."""
    found = []
    for place in sorted(range(len(options)), key=lambda place: -len(options[place])):
        pattern = rf"(?<![\w.-]){re.escape(options[place])}(?![\w+#]|\.\d)"
        if options[place] and re.search(pattern, text):
            found.append(place)
            text = re.sub(pattern, "\0", text)
    return found


def _polarity(text: str) -> str | None:
    """`yes` or `no`: the leading word, else what "the answer is" says, else the only such word in the text, which a
    negation before it turns round ("that is not true")."""
    clause = _answer_clause(text)
    for part in [text, clause] if clause else [text]:
        first = re.match(r"[^\w]*(\w+)", part)
        if first and first.group(1).lower() in _YES | _NO:
            return "yes" if first.group(1).lower() in _YES else "no"
    said = {
        _said(words, place) for words in _clauses(text) for place in range(len(words)) if words[place] in _YES | _NO
    }
    return said.pop() if len(said) == 1 else None


def _clauses(text: str) -> list[list[str]]:
    """The words of a text, lower case, between its punctuation marks."""
    return [re.findall(r"[\w'’]+", part) for part in re.split(r"[,;:.!?\n]+", text.lower())]


def _said(words: list[str], place: int) -> str:
    """What the word at `place` says, after the few before it. "No" itself is never turned round."""
    yes = words[place] in _YES
    turned = any(_NEGATION.fullmatch(word) for word in words[max(0, place - 5) : place])
    return "yes" if yes != (turned and words[place] not in ("no", "nope")) else "no"


def _number(text: str) -> str | None:
    """The number stated as the answer, else the result of a calculation, else the last number; parentheses aside.

    Without currency and commas, with what scales it: `50%`, `3/4`, `3 million`.
    """
    text = _FRACTION.sub(r"\1/\2", _GROUPED.sub("", text.translate(DASHES)))
    text = _CURRENCY.sub("", _SIGN_WORD.sub("-", text))
    if BOX_IN_TEXT.fullmatch(text):
        return None
    clause = _answer_clause(text)
    for part, position in ((clause, 0), (text, -1)) if clause else ((text, -1),):
        plain = re.sub(r"\([^()]*\)", lambda m: " " if re.search("[A-Za-z]", m[0]) else m[0], part)  # "(see Figure 2)"
        if position == 0 and "=" in plain:
            plain = plain[plain.rindex("=") + 1 :]
        found = _NUMBER_IN_TEXT.findall(plain)
        if found:
            return found[position].replace(",", "").removeprefix("+").replace(" %", "%")
        if spelled := _spelled(plain):
            return str(spelled[position])
    return None


def _spelled(text: str) -> list[int]:
    """The numbers written in words: "twenty-one", "three hundred and five thousand"."""
    values: list[int] = []
    room = 0  # the last number is still open to one below this: after "twenty" to 9, after "hundred" to 99
    for word in re.findall(r"[a-z]+|[^a-z\s]", text.lower()):
        if (value := NUMBER_WORDS.get(word)) is not None:
            if 0 < value < room:
                values[-1] += value
            else:
                values.append(value)
            room = 10 if value >= 20 else 1
        elif scale := SCALE_WORDS.get(word):
            if room:  # of what stands before it, the part below this scale is meant: 2,000 + 3 → 2,000 + 300
                values[-1] += (values[-1] % scale) * (scale - 1)
            else:
                values.append(scale)
            room = scale
        elif word != "-" and not (word == "and" and room >= 100):
            room = 0
    return values


def _box(text: str) -> list[str] | None:
    """The first bracketed list of four numbers, else the first four in a row, else the first four of the text. An edge
    outside the picture is at its border."""
    match = BOX_IN_TEXT.search(text) or _FOUR.search(text)
    found = list(match.groups()) if match else _COORDINATE_IN_TEXT.findall(text)[:4]
    return ordered_box(["0" if number.startswith("-") else number for number in found])


def _formula(text: str) -> str | None:
    """The last delimited formula that is more than a symbol ("…, where $x$ is real"), in what "the answer is" states if
    there is any there; else what is stated, else the text."""
    clause = _answer_clause(text) or ""
    found = [strip_math(formula) for formula in _FORMULA.findall(clause) or _FORMULA.findall(text)]
    whole = [formula for formula in found if len(formula) > 1] or found
    return (whole[-1] if whole else strip_math(clause or text)) or None
