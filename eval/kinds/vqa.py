"""VQA accuracy: how many of ten people gave the answer (VQAv2, TextVQA, VizWiz)."""

import re

from mcit.data_prep.schema import Sample

from .base import Scorer

_CONTRACTIONS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock
oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's
they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's
where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've
y'all y'all'll y'all'd've you'd you'd've you'll you're you've
""".split()
# Official table: each word with any one of its apostrophes missing, and one entry that goes the other way.
_REPAIRS = {
    word[:at] + word[at + 1 :]: word for word in _CONTRACTIONS for at, sign in enumerate(word) if sign == "'"
} | {"somebody'd": "somebodyd"}
_NUMBERS = {
    word: str(value) for value, word in enumerate("zero one two three four five six seven eight nine ten".split())
} | {"none": "0"}
_PUNCTUATION = ';/[]"{}()=+\\_-><@`!'


def normalise(text: str, full_stops: int = 0) -> str:
    """An answer under the official VQA normalisation, quirks included ("a/b" → "b", "it's 5:30" → "it 's 5:30").

    `full_stops` is how many of those that no digit follows are dropped at most; 0 is all. The official code drops the
    first 32, since it passes `re.UNICODE` where a count is expected.
    Source: VQA evaluation code in its EvalAI form (facebookresearch/mmf, pythia/tasks/processors.py), which TextVQA's
    M4C evaluator, LLaVA and lmms-eval share.
    """
    words = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    words = words.replace("\n", " ").replace("\t", " ").strip()
    out = words
    for sign in _PUNCTUATION:
        if sign in words:
            beside_space = f"{sign} " in words or f" {sign}" in words
            out = out.replace(sign, "" if beside_space else " ")
    numbered = (_NUMBERS.get(word, word) for word in re.sub(r"\.(?!\d)", "", out, count=full_stops).split())
    return " ".join(_REPAIRS.get(word, word) for word in numbered if word not in ("a", "an", "the"))


def agreement(answer: str, references: list[str]) -> float:
    """For each annotator min(1, matches among the others / 3), averaged: 0–1. Texts are compared as they are.

    Source: Antol et al. 2015 and the official evaluation code.
    """
    hits = [reference == answer for reference in references]
    return sum(min(1.0, (sum(hits) - hit) / 3) for hit in hits) / len(hits)


def vqa_answer(text: str) -> str:
    """`normalise`; where that leaves nothing ("the"), the text itself, so that an article can match."""
    return normalise(text) or text.strip().lower()


def _vqa_soft(answer: str | None, references: list[str], sample: Sample) -> float:
    """VQA accuracy, by ten annotators as a rule.

    Fewer than four cannot reach 100 that way even when all agree; then matching any of them is right.
    """
    if answer is None or not answer.strip():
        return 0.0
    given, wanted = vqa_answer(answer), [vqa_answer(reference) for reference in references]
    return 100.0 * (given in wanted if len(wanted) < 4 else agreement(given, wanted))


SCORERS = (Scorer("vqa_soft", _vqa_soft, 50, "short"),)  # right: two of ten annotators
