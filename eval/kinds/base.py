"""What a scorer is, and how a comparison with one reference becomes one."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from mcit.data_prep.schema import Sample, Style

ScoreFunction = Callable[[str | None, list[str], Sample], float]
Match = Callable[[str, str, Sample], float]  # answer, one reference, sample → 0–1
References = Sequence[Sequence[str]]  # of each sample of a test set


@dataclass(frozen=True)
class Scorer:
    """A named score.

    `score(answer, references, sample)` is in 0–100; `right_from` is the score from which an answer counts as right in
    a verdict; `reads` is the style whose style-free extraction finds the answer in a response when nobody asked for a
    form (predictions made elsewhere); None takes the response as it is.

    A `whole` scorer is a published protocol: it judges the response as the model gave it, and gives its score whatever
    the form. Two fields are for scores that are not of one answer alone. `weigh` makes `score` out of the references of
    the whole test set (CIDEr's weights of words). `pooled(answers, references)` is the score of a whole test set where
    that is not the mean over its answers (BLEU).
    """

    name: str
    score: ScoreFunction
    right_from: float
    reads: Style | None
    whole: bool = False
    weigh: Callable[[References], ScoreFunction] | None = None
    pooled: Callable[[Sequence[str], References], float] | None = None

    def for_corpus(self, references: References) -> "Scorer":
        """This scorer for the answers to a test set with these references."""
        return replace(self, score=self.weigh(references)) if self.weigh else self


def best(match: Match) -> ScoreFunction:
    """The score of `match` against the best of the references; 100 for a reference to the letter, 0 for nothing."""

    def score(answer: str | None, references: list[str], sample: Sample) -> float:
        if answer is None or not answer.strip():
            return 0.0
        if any(answer.strip() == reference.strip() for reference in references):
            return 100.0
        return 100.0 * max((float(match(answer, reference, sample)) for reference in references), default=0.0)

    return score
