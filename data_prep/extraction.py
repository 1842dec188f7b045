"""What an answer says, whatever its form: style-free extraction."""

import re
import string
from collections.abc import Sequence

from .answers import (
    ANSWER_IS,
    BOX_IN_TEXT,
    COORDINATE,
    DIGITS,
    LETTERED,
    NUMBER_WORDS,
    is_phrase,
    is_sentence,
    normalise,
    ordered_box,
    sentences,
    split_tags,
    strip_math,
)
from .schema import Style

# Digits that belong to a name ("Figure2", "x1", "bbox_2d"), a fraction or a version are not numbers, and the minus of
# "5-3" is no sign.
_NUMBER_IN_TEXT = re.compile(rf"(?<![\w./])(?:(?<![)\]])[-+])?(?:{DIGITS})(?!\d|/\d|\.\d)")
_COORDINATE_IN_TEXT = re.compile(rf"(?<![\w./]){COORDINATE}(?![\w/])")
_VERB_AFTER_SUBJECT = re.compile(
    r"(?:\s+(?:is|are|was|were|has|have|shows?|depicts?|contains?|reads?|says?|displays?|equals)\s|['’]s\s)",
    re.IGNORECASE,
)
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
    if BOX_IN_TEXT.fullmatch(text):
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
    match = BOX_IN_TEXT.search(text)
    return ordered_box(list(match.groups()) if match else _COORDINATE_IN_TEXT.findall(text)[:4])


def _formula(text: str) -> str | None:
    """The last delimited formula, else what "the answer is" states, else the text."""
    found = re.findall(r"\$\$.+?\$\$|\$[^$]+\$|\\\(.+?\\\)|\\\[.+?\\\]", text, re.DOTALL)
    return strip_math(found[-1] if found else _answer_clause(text) or text) or None
