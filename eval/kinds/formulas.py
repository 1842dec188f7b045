"""Mathematics: equal in value, or LaTeX that is nearly the same."""

import logging
import re
import threading
from typing import Any

from rapidfuzz.distance import Levenshtein

from mcit.data_prep.schema import Sample

from .base import Scorer, best
from .words import same_words

logging.getLogger("math_verify").setLevel(logging.ERROR)  # it prints whole answers that it gave up on
_MATH_TAIL = 1_000  # characters; a final answer stands at the end, and parsing a flood would take minutes
_PROSE = re.compile(r"[^\W\d_]{3,}")
_DELIMITED = re.compile(r"\$|\\boxed|\\\(|\\\[")


def _is_prose(text: str) -> bool:
    """Whether there is a word in `text` that is neither a LaTeX command nor a product of two variables."""
    return _PROSE.search(re.sub(r"\\[A-Za-z]+", "", text)) is not None


def _expressions(text: str, timeout: int | None) -> list[Any]:
    """What math-verify reads in `text`; text that is one bare formula is marked as such before."""
    from math_verify import parse  # sympy takes seconds to import, and most runs have no mathematics

    text = text[-_MATH_TAIL:]
    forms = [text, f"${text}$"]
    if not _DELIMITED.search(text) and not _is_prose(text):
        forms.reverse()
    return next((found for form in forms if (found := parse(form, parsing_timeout=timeout))), [])


def _math(answer: str, reference: str, sample: Sample) -> float:
    """Mathematical equality by math-verify ("1/2", "0.5", "\\frac12"); of words ("no solution"), by `same_words`."""
    from math_verify import verify

    if _is_prose(reference) and same_words(answer, reference, sample):
        return 1.0
    # Its time limit is an alarm signal, which Python delivers to the main thread only. It is long, since no score may
    # depend on how busy the machine is.
    timeout = 10 if threading.current_thread() is threading.main_thread() else None
    wanted, given = _expressions(reference, timeout), _expressions(answer, timeout)
    return bool(wanted and given) and verify(wanted, given, timeout_seconds=timeout)


_TOKEN = re.compile(r"\\[A-Za-z]+|\\.|\S")
_LAYOUT = frozenset(r"$ \( \) \[ \] \, \; \: \! \left \right \big \Big \displaystyle \textstyle \quad \qquad ~".split())
_SAME = {r"\dfrac": r"\frac", r"\tfrac": r"\frac", r"\le": r"\leq", r"\ge": r"\geq", r"\ne": r"\neq"}


def latex_tokens(text: str) -> list[str]:
    """LaTeX as tokens, without what only lays it out: delimiters, spacing, `\\left`, braces around one token."""
    tokens = (_SAME.get(token, token) for token in _TOKEN.findall(text) if token not in _LAYOUT)
    out: list[str] = []
    for token in tokens:
        if token == "}" and len(out) >= 2 and out[-2] == "{" and out[-1] != "{":
            out[-2:] = [out[-1]]
        else:
            out.append(token)
    return out


def _latex(answer: str, reference: str, sample: Sample) -> float:
    """1 − edit distance over LaTeX tokens / longer length (as for im2latex, Deng et al. 2017)."""
    return Levenshtein.normalized_similarity(latex_tokens(answer), latex_tokens(reference))


SCORERS = (
    Scorer("math", best(_math), 100, None),
    Scorer("latex", best(_latex), 90, "latex"),  # right: one token in ten may differ (ours)
)
