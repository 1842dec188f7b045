"""Captions and other free text: words, and runs of words, in common with the references.

The libraries are imported where they are used: most runs have no captions.
"""

import re
from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import Any

from rapidfuzz.distance import LCSseq

from mcit.data_prep.schema import Sample

from .base import References, ScoreFunction, Scorer, best

Consensus = Callable[[str, Sequence[str]], float]  # answer, references → score

_WORD = re.compile(r"[^\W_]+")
_CLITIC = re.compile(r"n't\b|'(?:s|m|d|ll|re|ve)\b")
_TOKEN = re.compile(rf"{_CLITIC.pattern}|[^\W_]+(?:[-.,:/'][^\W_]+)*")


def words(text: str) -> list[str]:
    """The words of a caption in lower case, without punctuation, what is contracted apart: "man's" is "man", "'s".

    The COCO evaluation has Stanford's Penn Treebank tokenizer do this, in Java; these are its rules for what captions
    hold, not all of them.
    """
    return _TOKEN.findall(_CLITIC.sub(r" \g<0>", text.lower().replace("’", "'")))


def _rouge_l(answer: str, reference: str, sample: Sample) -> float:
    """ROUGE-L: F1 of the longest common subsequence of words (Lin 2004), without stemming.

    Equal to the `rouge-score` package on ASCII text; that one drops every other letter, needs memory in proportion to
    the product of the lengths, and takes seconds to import.
    """
    given, wanted = _WORD.findall(answer.lower()), _WORD.findall(reference.lower())
    return 2 * LCSseq.similarity(given, wanted) / (len(given) + len(wanted)) if given and wanted else 0.0


def _bleu(answer: str | None, references: list[str], sample: Sample) -> float:
    """BLEU-4 of one answer (sacreBLEU, lower case, orders longer than the answer left out)."""
    from sacrebleu.metrics.bleu import BLEU

    if answer is None or not answer.strip():
        return 0.0
    return min(100.0, BLEU(lowercase=True, effective_order=True).sentence_score(answer, references).score)


def _corpus_bleu(answers: Sequence[str], references: References) -> float:
    """BLEU-4 as papers print it: n-grams counted over all answers (Papineni et al. 2002; sacreBLEU, lower case)."""
    from sacrebleu.metrics.bleu import BLEU

    return min(100.0, BLEU(lowercase=True).corpus_score(answers, streams(references)).score)


def streams(references: References) -> list[list[Any]]:
    """References by sample as sacreBLEU wants them: the first of each sample, the second, …; None for none."""
    return [list(stream) for stream in zip_longest(*references)]


class _NoSynonyms:
    """Stands for WordNet, which is a download and no package."""

    def synsets(self, word: str) -> list[Any]:
        return []


def meteor(answer: str, references: Sequence[str]) -> float:
    """METEOR, 0–1, of the best reference: words matched exactly, then by Porter's stem; without synonyms.

    Source: Lavie & Agarwal 2007 (α 0.9, β 3, γ 0.5), by nltk. The COCO evaluation's METEOR 1.5, a Java program with
    other parameters, synonyms and paraphrases, gives other figures.
    """
    from nltk.translate.meteor_score import single_meteor_score

    given, known = words(answer), _NoSynonyms()
    return max((single_meteor_score(words(reference), given, wordnet=known) for reference in references), default=0.0)


def _meteor(answer: str | None, references: list[str], sample: Sample) -> float:
    return 100.0 * meteor(answer or "", references)


class _Counts(dict[tuple[str, ...], float]):
    """How many samples have an n-gram in a reference: 0 for one that none has, which is not remembered."""

    def __missing__(self, ngram: tuple[str, ...]) -> float:
        return 0.0


def cider(corpus: References) -> Consensus:
    """CIDEr-D, 0–10, weighed by the references of a whole test set: what has few of them says more.

    A corpus of less than two samples cannot tell, and then all n-grams weigh the same. It is a mean over the references
    of a sample: only where they agree is a high score to be had. Papers print a hundred times as much.
    Source: Vedantam et al. 2015 (arXiv 1411.5726), by the code of the COCO evaluation (`pycocoevalcap`).
    """
    from pycocoevalcap.cider.cider_scorer import CiderScorer, cook_refs, cook_test

    known = CiderScorer()
    for captions in corpus if len(corpus) > 1 else ():
        known.cook_append(None, [" ".join(words(caption)) for caption in captions])
    known.compute_doc_freq()
    counts, others = _Counts(known.document_frequency), [None] * max(1, len(corpus) - 1)

    def consensus(answer: str, references: Sequence[str]) -> float:
        one = CiderScorer()
        one.document_frequency = counts
        # It scores as many as it has answers, and takes the number of samples from the length of the references.
        one.crefs = [cook_refs([" ".join(words(reference)) for reference in references]), *others]
        one.ctest = [cook_test(" ".join(words(answer)))]
        return float(one.compute_cider()[0])

    return consensus


def _weighed_cider(corpus: References) -> ScoreFunction:
    consensus = cider(corpus)

    def score(answer: str | None, references: list[str], sample: Sample) -> float:
        return min(100.0, 10.0 * consensus(answer or "", references))

    return score


def _cider(answer: str | None, references: list[str], sample: Sample) -> float:
    """CIDEr-D × 10 of an answer that belongs to no test set, as a reward does: all n-grams weigh the same."""
    return _weighed_cider(())(answer, references, sample)


def _mean(*parts: ScoreFunction) -> ScoreFunction:
    def score(answer: str | None, references: list[str], sample: Sample) -> float:
        return sum(part(answer, references, sample) for part in parts) / len(parts)

    return score


# Right: half of the words in order for ROUGE-L. For the others conventions of ours, at what a good caption gets.
# The mean in `caption` is ours too: each of the four has its blind spot.
_EACH = (_bleu, _meteor, best(_rouge_l))
SCORERS = (
    Scorer("rouge_l", best(_rouge_l), 50, None),
    Scorer("bleu", _bleu, 20, "caption", pooled=_corpus_bleu),
    Scorer("meteor", _meteor, 40, "caption"),
    Scorer("cider", _cider, 10, "caption", weigh=_weighed_cider),
    Scorer("caption", _mean(*_EACH, _cider), 30, "caption", weigh=lambda corpus: _mean(*_EACH, _weighed_cider(corpus))),
)
