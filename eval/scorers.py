"""What an answer is worth: the register of scorers, by kind, protocol or `module:function`.

A kind (`eval/kinds/`) gets the parsed answer (text, or None when nothing could be read), the accepted references and
the sample. It is correct by default: the best of several references counts, an empty answer never scores, and it does
not repeat the defects of published evaluation scripts. A protocol (`eval/protocols/`) is a published script, defects
included, for comparing with figures that were made with it.
"""

import difflib
from pathlib import Path

from mcit.data_prep.errors import InputError
from mcit.data_prep.readers import is_function, load_function, source_identity
from mcit.data_prep.schema import Sample

from .kinds import boxes, captions, choice, formulas, numbers, vqa, words
from .kinds.base import Scorer
from .protocols import FAMILIES, PROTOCOLS

__all__ = ["SCORERS", "Scorer", "get_protocol", "get_scorer", "scorer_identity"]

_FAMILIES_OF_KINDS = (choice, words, vqa, numbers, formulas, captions, boxes)
SCORERS: dict[str, Scorer] = {scorer.name: scorer for family in _FAMILIES_OF_KINDS for scorer in family.SCORERS}


def get_scorer(name: str) -> Scorer:
    """The scorer of a kind, of a protocol (`family:task`), or of `module:function`.

    A user's function gets `(response: str, references: list[str], sample: dict)` and returns 0–100; it is never asked
    about an empty answer; its attribute `right_from` (default 50) says from which score an answer is right.
    Raises `InputError` for an unknown name, and when the function fails or returns no such number.
    """
    if name in SCORERS:
        return SCORERS[name]
    if name.partition(":")[0] in FAMILIES:
        return get_protocol(name)
    if is_function(name):
        return _user_scorer(name)
    near = difflib.get_close_matches(name, [*SCORERS, *PROTOCOLS], n=1)
    known = f"Known: {', '.join(SCORERS)}; a protocol, such as coin:imagenet; or module:function"
    raise InputError(f"unknown scorer {name!r}", remedy=f"Did you mean {near[0]}?" if near else known)


def get_protocol(name: str) -> Scorer:
    """The protocol `family:task`. Raises `InputError` that names the nearest one, or the tasks of the family."""
    if name in PROTOCOLS:
        return PROTOCOLS[name]
    family = name.partition(":")[0]
    near = difflib.get_close_matches(name.lower(), PROTOCOLS, n=1) if ":" in name else []
    known = [protocol for protocol in PROTOCOLS if protocol.partition(":")[0] == family]
    families = (f"{each}:<task>" for each in FAMILIES)
    remedy = f"Did you mean {near[0]}?" if near else f"Known: {', '.join(known or families)}"
    raise InputError(f"unknown protocol {name!r}", remedy=remedy)


def scorer_identity(name: str) -> str:
    """What a fingerprint holds of a scorer: its name, and of a user's function its code too. Raises `InputError`."""
    own = is_function(name) and name.partition(":")[0] not in FAMILIES
    return f"{name} {source_identity(name, Path.cwd())}" if own else name


def _user_scorer(name: str) -> Scorer:
    function = load_function(name, Path.cwd())

    def score(answer: str | None, references: list[str], sample: Sample) -> float:
        if answer is None or not answer.strip():
            return 0.0
        where = f"scorer {name}: sample {sample.get('id', '?')}"
        try:
            value = float(function(answer, references, sample))
        except Exception as error:
            raise InputError(f"{type(error).__name__}: {error}", where=where) from error
        if not 0 <= value <= 100:
            raise InputError(f"returned {value}", where=where, remedy="A score lies between 0 and 100")
        return value

    return Scorer(name, score, float(getattr(function, "right_from", 50)), None)
