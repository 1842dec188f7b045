"""How two answers are made comparable: plain text, the VQA challenge's normalisation, numbers, LaTeX tokens."""

import itertools
import re
import unicodedata
from fractions import Fraction
from typing import NamedTuple

# Signs that look alike, and those that Unicode's compatibility form (NFKC) would merge with digits: 10² is not 102.
_LOOKALIKES = str.maketrans(
    {"’": "'", "‘": "'", "“": '"', "”": '"', "–": "-", "—": "-", "−": "-", "‑": "-"}
    | {sign: f"^{digit}" for digit, sign in enumerate("⁰¹²³⁴⁵⁶⁷⁸⁹")}
    | {"½": " 1/2", "¼": " 1/4", "¾": " 3/4"}
)
_OPENING = " \t\r\n\"'`«([{*_"
_CLOSING = " \t\r\n\"'`»)]}*_.,;:!?"
_ARTICLE = re.compile(r"^(?:a|an|the)\s+(?=\S)")


def plain(text: str) -> str:
    """Lower case, one kind of space, quote and dash, no quotes, brackets or closing punctuation around, no article.

    Never empty unless `text` is blank: what consists of punctuation alone is kept. Signs and units are content
    ("-5", "$5", "5%" and ".5" stay as they are).
    """
    text = " ".join(unicodedata.normalize("NFKC", text.translate(_LOOKALIKES)).casefold().split())
    bare = text.lstrip(_OPENING).rstrip(_CLOSING)
    return _ARTICLE.sub("", bare) or text


# --- The VQA challenge (EvalAI): the processor shared by TextVQA's M4C evaluator, LLaVA and lmms-eval -------------

_VQA_CONTRACTIONS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock
oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's
they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's
where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've
y'all y'all'll y'all'd've you'd you'd've you'll you're you've
""".split()
# Official table: each word with any one of its apostrophes missing, and one entry that goes the other way.
_VQA_REPAIRS = {
    word[:at] + word[at + 1 :]: word for word in _VQA_CONTRACTIONS for at, sign in enumerate(word) if sign == "'"
} | {"somebody'd": "somebodyd"}
_VQA_NUMBERS = {
    word: str(value) for value, word in enumerate("zero one two three four five six seven eight nine ten".split())
} | {"none": "0"}
_VQA_PUNCTUATION = ';/[]"{}()=+\\_-><@`!'


def vqa_answer(text: str) -> str:
    """An answer under the official VQA normalisation, quirks included ("a/b" → "b", "it's 5:30" → "it 's 5:30").

    Source: VQA evaluation code and its EvalAI form (facebookresearch/mmf, pythia/tasks/processors.py). Two slips there
    that only cost speed or act beyond 32 full stops are not repeated. Where nothing would be left ("the"), the text
    itself is returned, so that an answer that is an article can still match.
    """
    words = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    words = words.replace("\n", " ").replace("\t", " ").strip()
    out = words
    for sign in _VQA_PUNCTUATION:
        if sign in words:
            beside_space = f"{sign} " in words or f" {sign}" in words
            out = out.replace(sign, "" if beside_space else " ")
    numbered = (_VQA_NUMBERS.get(word, word) for word in re.sub(r"\.(?!\d)", "", out).split())
    kept = [_VQA_REPAIRS.get(word, word) for word in numbered if word not in ("a", "an", "the")]
    return " ".join(kept) or text.strip().lower()


# --- Numbers --------------------------------------------------------------------------------------------------------


class Number(NamedTuple):
    """A number as written: its exact value (scale words applied) and its unit ("%", "kg", "$" …), or ""."""

    value: Fraction
    unit: str


_NUMBER = re.compile(
    r"(?:(?P<money>[$€£¥])\s?)?(?P<sign>[-+]?)(?P<money2>[$€£¥]?)"
    r"(?P<digits>\d{1,3}(?:,\d{3})+(?:\.\d*)?|\d+(?:\.\d*)?|\.\d+)"
    r"(?:e(?P<exponent>[-+]?\d{1,3})|\s?/\s?(?P<denominator>\d+))?"
    r"\s?(?P<unit>%|[^\W\d_]+(?:[ /][^\W\d_]+)?(?:\^?[23])?|°\s?[cf]?|[$€£¥])?"
)
_SCALES = {"thousand": 1_000, "million": 1_000_000, "billion": 1_000_000_000, "trillion": 1_000_000_000_000}
_LONGEST_NUMBER = 100  # characters; anything longer is not an answer but a flood


def to_number(text: str) -> Number | None:
    """The number that `text` is as a whole ("-1,234.5 kg", "3/4", "50 %", "$2 million"), or None.

    A comma groups thousands; a decimal comma is ambiguous and so is not a number here.
    """
    if len(text) > 4 * _LONGEST_NUMBER or len(text := plain(text)) > _LONGEST_NUMBER:
        return None
    match = _NUMBER.fullmatch(text)
    if not match or (match["denominator"] and not int(match["denominator"])):
        return None
    value = Fraction(match["sign"] + match["digits"].replace(",", "").rstrip(".") + "e" + (match["exponent"] or "0"))
    value /= int(match["denominator"] or 1)
    money = match["money"] or match["money2"] or ""
    unit = (match["unit"] or money).replace("^", "")
    scale, _, rest = unit.partition(" ")
    if scale in _SCALES:
        value, unit = value * _SCALES[scale], rest or money
    return Number(value, "%" if unit in ("percent", "per cent") else unit)


def same_number(answer: Number, reference: Number, tolerance: float) -> bool:
    """Whether two numbers agree within `tolerance` (relative to the reference).

    A unit given on one side only is no difference, and then 50 % is both 50 and 0.5; two different units are one.
    """
    if answer.unit and reference.unit and answer.unit != reference.unit:
        return False

    def readings(number: Number, other: Number) -> list[Fraction]:
        share = number.unit == "%" and not other.unit
        return [number.value, number.value / 100] if share else [number.value]

    pairs = itertools.product(readings(answer, reference), readings(reference, answer))
    return any(abs(given - wanted) <= Fraction(tolerance) * abs(wanted) for given, wanted in pairs)


# --- LaTeX ----------------------------------------------------------------------------------------------------------

_LATEX_TOKEN = re.compile(r"\\[A-Za-z]+|\\.|\S")
_LATEX_LAYOUT = frozenset(
    r"$ \( \) \[ \] \, \; \: \! \left \right \big \Big \displaystyle \textstyle \quad \qquad ~".split()
)
_LATEX_SAME = {r"\dfrac": r"\frac", r"\tfrac": r"\frac", r"\le": r"\leq", r"\ge": r"\geq", r"\ne": r"\neq"}


def latex_tokens(text: str) -> list[str]:
    """LaTeX as tokens, without what only lays it out: delimiters, spacing, `\\left`, braces around one token."""
    tokens = (_LATEX_SAME.get(token, token) for token in _LATEX_TOKEN.findall(text) if token not in _LATEX_LAYOUT)
    out: list[str] = []
    for token in tokens:
        if token == "}" and len(out) >= 2 and out[-2] == "{" and out[-1] != "{":
            out[-2:] = [out[-1]]
        else:
            out.append(token)
    return out
