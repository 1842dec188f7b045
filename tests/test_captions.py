"""Scores of free text: against hand-computed values, the definition by brute force, and the libraries papers used."""

import math
import random
from collections import Counter

import pytest

from mcit.eval.kinds.captions import words
from mcit.eval.protocols.mcitlib import _bleu, _rouge_l
from mcit.eval.scorers import SCORERS, get_scorer

VOCABULARY = "a the dog cat man runs sits on grass mat red big ball with".split()


def score(kind, answer, *references, corpus=()):
    return SCORERS[kind].for_corpus(corpus).score(answer, list(references), {"id": "s1"})


def make_corpus(seed, size=6, most=4):
    """Answers, and one to `most` references of each."""
    rng = random.Random(seed)

    def caption():
        return " ".join(rng.choices(VOCABULARY, k=rng.randint(1, 9)))

    return [caption() for _ in range(size)], [[caption() for _ in range(rng.randint(1, most))] for _ in range(size)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A man's red-brown T-shirt.", ["a", "man", "'s", "red-brown", "t-shirt"]),
        ("It doesn’t say; they're gone!", ["it", "does", "n't", "say", "they", "'re", "gone"]),
        ("3.5 kg, (1,000 of them)", ["3.5", "kg", "1,000", "of", "them"]),
        ("…?!", []),
        ("two\nlines", ["two", "lines"]),
    ],
)
def test_words(text, expected):
    assert words(text) == expected
    assert words(" ".join(expected)) == expected


# --- ROUGE-L --------------------------------------------------------------------------------------------------------


def lcs_length(a, b):
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
    return table[-1][-1]


def test_rouge_l_against_the_definition():
    rng = random.Random(2)
    for _ in range(300):
        a, b = (rng.choices("cat dog sat on the mat".split(), k=rng.randint(1, 9)) for _ in range(2))
        common = lcs_length(a, b)
        precision, recall = common / len(a), common / len(b)
        f1 = 2 * precision * recall / (precision + recall) if common else 0
        assert score("rouge_l", " ".join(a).title() + "!", " ".join(b)) == pytest.approx(100 * f1)


def test_rouge_l_equals_the_rouge_score_package():
    # values of rouge-score 0.1.2, rougeL F-measure without stemming
    assert score("rouge_l", "The quick brown dog jumps on the log.", "The quick brown fox jumps over the lazy dog") == (
        pytest.approx(100 * 0.5882352941176471)
    )
    given, wanted = "It's a state_of the-art 3.5 model", "its state of the art 3 5 models"
    assert score("rouge_l", given, wanted) == pytest.approx(100 * 0.6666666666666665)


# --- BLEU -----------------------------------------------------------------------------------------------------------


def test_bleu_of_an_answer_by_hand():
    assert score("bleu", "A dog", "a dog runs") == pytest.approx(100 * math.exp(1 - 3 / 2))  # two orders, both whole
    assert score("bleu", "a dog runs", "a dog runs", "x") == pytest.approx(100)


def test_bleu_of_a_set_counts_over_all_answers():
    answers, references = ["the cat sat on the mat", "a dog"], [["the cat sat on the mat", "a cat"], ["a dog runs"]]
    # every n-gram of both is right; 8 words where 6 + 3 are wanted
    assert SCORERS["bleu"].pooled(answers, references) == pytest.approx(100 * math.exp(1 - 9 / 8))
    assert SCORERS["bleu"].pooled(["", ""], references) == 0


# --- METEOR ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ("a dog runs", "a dog runs", 1 - 0.5 / 27),  # one chunk of three words
        ("a dog runs", "A dog running!", 1 - 0.5 / 27),  # the same stem
        ("runs dog a", "a dog runs", 1 - 0.5),  # three chunks
        ("a dog", "a dog runs fast", (0.5 / 0.95) * (1 - 0.5 / 8)),  # precision 1, recall 1/2, α = 0.9
        ("a cat", "two dogs", 0),
        ("big", "large", 0),  # no synonyms
    ],
)
def test_meteor_by_hand(answer, reference, expected):
    assert score("meteor", answer, "something else", reference) == pytest.approx(100 * expected)


# --- CIDEr ----------------------------------------------------------------------------------------------------------


def cider_by_definition(answer, references, corpus):
    """CIDEr-D of Vedantam et al. 2015 (§3 and appendix), n = 1…4, σ = 6, with idf = log(N / max(1, df))."""

    def grams(text, n):
        tokens = text.split()
        return Counter(tuple(tokens[at : at + n]) for at in range(len(tokens) - n + 1))

    def weigh(counts, n):
        frequency = {gram: sum(any(gram in grams(c, n) for c in captions) for captions in corpus) for gram in counts}
        return {gram: count * math.log(len(corpus) / max(1, frequency[gram])) for gram, count in counts.items()}

    total = 0.0
    for reference in references:
        for n in (1, 2, 3, 4):
            given, wanted = weigh(grams(answer, n), n), weigh(grams(reference, n), n)
            norms = math.sqrt(sum(v * v for v in given.values()) * sum(v * v for v in wanted.values()))
            product = sum(min(value, wanted.get(gram, 0)) * wanted.get(gram, 0) for gram, value in given.items())
            # the code's length is that of the list of pairs of words
            apart = max(0, len(answer.split()) - 1) - max(0, len(reference.split()) - 1)
            total += (product / norms if norms else 0) * math.exp(-(apart**2) / 72)
    return 10 * total / 4 / len(references)


@pytest.mark.parametrize("seed", range(5))
def test_cider_against_the_definition(seed):
    answers, references = make_corpus(seed)
    for answer, captions in zip(answers, references, strict=True):
        expected = min(100, 10 * cider_by_definition(answer, captions, references))
        assert score("cider", answer, *captions, corpus=references) == pytest.approx(expected, abs=1e-9)


def test_cider_equals_that_of_the_coco_evaluation():
    from pycocoevalcap.cider.cider import Cider

    answers, references = make_corpus(7, size=40)
    _, published = Cider().compute_score(dict(enumerate(references)), {i: [a] for i, a in enumerate(answers)})
    ours = [
        score("cider", *row, corpus=references) for row in ([a, *r] for a, r in zip(answers, references, strict=True))
    ]
    assert ours == pytest.approx([min(100, 10 * value) for value in published], abs=1e-9)


def test_cider_weighs_words_by_the_whole_test_set():
    corpus = [["a dog runs on grass"], ["a cat sits on a mat"], ["a man sits on grass"]]
    right = score("cider", "a dog runs on grass", "a dog runs on grass", corpus=corpus)
    rare = score("cider", "the dog", "a dog runs on grass", corpus=corpus)
    common = score("cider", "on a", "a dog runs on grass", corpus=corpus)
    assert right == pytest.approx(100) and right > rare > common
    assert score("cider", "a", "a dog runs on grass", corpus=corpus) == 0  # in every sample: says nothing
    assert score("cider", "a", "a dog runs on grass") > 0  # without a test set all weigh the same


def test_a_score_of_one_sample_is_defined():
    assert score("cider", "a dog runs on grass", "a dog runs on grass", corpus=[["a dog runs on grass"]]) == (
        pytest.approx(100)
    )


def test_caption_is_the_mean_of_four():
    answers, references = make_corpus(3)
    for answer, captions in zip(answers, references, strict=True):
        parts = [score(kind, answer, *captions, corpus=references) for kind in ("bleu", "meteor", "rouge_l", "cider")]
        assert score("caption", answer, *captions, corpus=references) == pytest.approx(sum(parts) / 4)


# --- MCITlib's mean of seven ----------------------------------------------------------------------------------------


def test_bleu_and_rouge_of_mcitlib_equal_those_of_the_coco_evaluation():
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.rouge.rouge import Rouge

    answers, references = make_corpus(11, size=40)
    answers = [f"{captions[0]} {answer}" for answer, captions in zip(answers, references, strict=True)]
    gold, given = dict(enumerate(references)), {i: [answer] for i, answer in enumerate(answers)}
    assert _bleu(answers, references) == pytest.approx(Bleu(4).compute_score(gold, given, verbose=0)[0], abs=1e-6)
    _, published = Rouge().compute_score(gold, given)
    assert [_rouge_l(*row) for row in zip(answers, references, strict=True)] == pytest.approx(list(published))


def test_mcitlib_captions_are_scored_as_a_set():
    answers, references = make_corpus(5)
    protocol = get_scorer("mcitlib:flickr30k")
    perfect = protocol.pooled([captions[0] for captions in references], references)
    assert protocol.pooled([""] * len(answers), references) == 0 < protocol.pooled(answers, references) < perfect
    weighed = protocol.for_corpus(references)
    rows = [weighed.score(answer, captions, {"id": "s"}) for answer, captions in zip(answers, references, strict=True)]
    assert sum(rows) / len(rows) != pytest.approx(protocol.pooled(answers, references))
