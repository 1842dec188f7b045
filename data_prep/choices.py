"""Whether a task's short answers are a closed set: a few texts that come again and again."""

from .forms import final_answer
from .readers import Part
from .schema import Sample

MOST = 256  # texts in a closed set; more are a vocabulary
REPEATED = 10  # times that a text is given on average, at least: five answers to five questions are no closed set


class Answers:
    """Looks at a task's gold answers, and finds in the end whether they are a closed set."""

    def __init__(self) -> None:
        self.counts = 0  # training samples
        self.texts: set[str] | None = set()  # of the training part; None: too many
        self.tested = set[frozenset[str]]()  # what the samples of the test part accept

    def look(self, sample: Sample, part: Part) -> None:
        """One more sample."""
        if sample["style"] not in ("short", "label") or self.texts is None:
            self.texts = None
            return
        if part == "train":
            self.counts += 1
            self.texts.add(final_answer(sample["completion"]))
            if len(self.texts) > MOST:
                self.texts = None
        elif part == "test":
            self.tested.add(frozenset(sample["references"]))

    def closed(self) -> list[str] | None:
        """The answers, in alphabetical order, where they are a closed set; else None.

        They are one where at least two and at most `MOST` texts are given, each `REPEATED` times on average, and every
        test sample accepts one of them.
        """
        texts = self.texts
        if not texts or len(texts) < 2 or self.counts < REPEATED * len(texts):
            return None
        return sorted(texts) if all(accepted & texts for accepted in self.tested) else None
