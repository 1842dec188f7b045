"""MCITlib (arXiv 2508.07307), as its code scores UCIT and MLLM-DCL: Ghy0501/MCITlib @2956dfd, `llava/eval/`."""

import math
from collections.abc import Sequence
from pathlib import PurePath
from typing import Any

from rapidfuzz.distance import LCSseq

from mcit.data_prep.schema import Sample

from ..kinds.base import References, ScoreFunction
from ..kinds.captions import Consensus, cider, meteor, streams, words
from ..stats import mean
from . import coin
from .base import missing, protocol

_EXACT_SOURCES = ("AI2D", "TQA", "VQA", "SciVerse")


def _driving(response: str, references: list[str], sample: Sample) -> float:
    """RS and AD (`eval_ai2d`): the answer somewhere in the response, whatever the case.

    Defect: several words need not be whole words ("a red car" is in "a red carpet"); one word must stand beside a
    space, full stop or comma on either side, so that "no" is right in "unknown, no" and in "casino floor".
    """
    if _is_unanswerable(response):
        return 0.0
    given, wanted = response.lower(), references[0].lower()
    if " " in wanted:
        return wanted in given
    wanted = wanted.replace(".", "")
    if " " not in given:
        return wanted in given
    return any(form in given for form in (f" {wanted}", f"{wanted} ", f"{wanted}.", f"{wanted},"))


def _medicine(response: str, references: list[str], sample: Sample) -> float:
    """Med (`eval_pvqa`): the answer anywhere in the response. Defect: "no" is in "unknown"."""
    return not _is_unanswerable(response) and references[0].lower() in response.lower()


def _science(response: str, references: list[str], sample: Sample) -> float:
    """Sci (`eval_sci`): exact for AI2D, TQA, VQA and SciVerse, told by the image file's name; else (maps) contained.

    Of a question with "Which states", the share of the states that are named. Defect: states named besides cost
    nothing, and a space after a comma makes another state.
    """
    if _is_unanswerable(response):
        return 0.0
    given, wanted = response.lower(), references[0].lower()
    if _picture(sample).split("_")[0] in _EXACT_SOURCES:
        return given == wanted
    if "Which states" in _question(sample):
        states, named = wanted.split(","), given.split(",")
        return sum(state in named for state in states) / len(states)
    return wanted in given


def _finance(response: str, references: list[str], sample: Sample) -> float:
    """Fin (`eval_finvis`): exact, whatever the case, without the spaces and full stops of the response."""
    if _is_unanswerable(response):
        return 0.0
    return response.lower().replace(" ", "").replace(".", "") == references[0].lower()


def _is_unanswerable(response: str) -> bool:
    """Defect: what holds this word is wrong, also where it is the answer."""
    return "Unanswerable" in response


def _picture(sample: Sample) -> str:
    """The file name of the sample's image: `images` of a sample, or `image` of a line."""
    images: Any = sample.get("images")
    named = [*(images if isinstance(images, list) else ()), sample.get("image")]
    if not isinstance(named[0], str):
        raise missing(sample, "image", "the source of a Sci question is told by the name of its image file")
    return PurePath(named[0]).name


def _question(sample: Sample) -> str:
    """What was asked: `prompt` as chat turns, or as text."""
    prompt: Any = sample.get("prompt")  # of a line that somebody wrote
    last = prompt[-1] if isinstance(prompt, list) and prompt else {"content": prompt}
    if not isinstance(last, dict) or not isinstance(last.get("content"), str) or not last["content"]:
        raise missing(sample, "prompt", "how a Sci question is scored depends on its words")
    return str(last["content"])


# --- Captions (`eval_caption`) --------------------------------------------------------------------------------------


def _seven(answers: Sequence[str], references: References, consensus: Consensus) -> float:
    """The mean of BLEU-1 to 4, METEOR, ROUGE-L and CIDEr × 100 over a test set, as a share of 100.

    More than 100 can be had, since CIDEr reaches 10. Not as published: words are told apart by rules instead of
    Stanford's tokenizer, and METEOR is nltk's, averaged, instead of METEOR 1.5, since both of those are Java programs.
    """
    cooked = [" ".join(words(answer)) for answer in answers]
    wanted = [[" ".join(words(reference)) for reference in captions] for captions in references]
    rows = list(zip(cooked, wanted, strict=True))
    parts = [
        *_bleu(cooked, wanted),
        mean([meteor(answer, captions) for answer, captions in rows]),
        mean([_rouge_l(answer, captions) for answer, captions in rows]),
        mean([consensus(answer, captions) for answer, captions in rows]),
    ]
    return mean(parts)


def _bleu(answers: Sequence[str], references: References) -> list[float]:
    """BLEU-1 to 4, 0–1, n-grams counted over all answers, without smoothing."""
    from sacrebleu.metrics.bleu import BLEU

    bleu = BLEU(tokenize="none", smooth_method="none", force=True)
    counted = bleu.corpus_score(answers, streams(references))
    return [counted.bp * (math.prod(counted.precisions[:n]) ** (1 / n)) / 100 for n in (1, 2, 3, 4)]


def _rouge_l(answer: str, references: Sequence[str]) -> float:
    """ROUGE-L, 0–1, of the COCO evaluation: β = 1.2, from the best precision and the best recall of any reference."""
    given = answer.split()
    common = [(LCSseq.similarity(given, wanted.split()), len(wanted.split())) for wanted in references]
    precision = max(shared / max(1, len(given)) for shared, _ in common)
    recall = max(shared / max(1, length) for shared, length in common)
    return 2.44 * precision * recall / (recall + 1.44 * precision) if precision and recall else 0.0


def _weighed(corpus: References) -> ScoreFunction:
    consensus = cider(corpus)

    def score(response: str | None, references: list[str], sample: Sample) -> float:
        return 100.0 * _seven([response or ""], [references], consensus)

    return score


def _caption(response: str, references: list[str], sample: Sample) -> float:
    return _weighed(())(response, references, sample) / 100


def _pooled(answers: Sequence[str], references: References) -> float:
    return 100.0 * _seven(answers, references, cider(references))


_CAPTION = protocol(_caption, right_from=30, weigh=_weighed, pooled=_pooled)

TASKS = {
    "imagenet-r": protocol(coin.exact),
    "arxivqa": protocol(coin.exact),
    "vizwiz": _CAPTION,
    "iconqa": protocol(coin.exact),
    "clevr-math": protocol(coin.exact),
    "flickr30k": _CAPTION,
    "rs": protocol(_driving),
    "med": protocol(_medicine),
    "ad": protocol(_driving),
    "sci": protocol(_science),
    "fin": protocol(_finance),
}
