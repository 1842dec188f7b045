"""Questions about pictures, as many tokens long as those of published sets are: only lengths are like theirs.

What a picture takes is drawn from sizes that are common in the set it stands for, with shares that are ours: nobody
publishes them. Words are those that the embedded model's tokenizer has as one token each, so words count as tokens.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from mcit.data_prep.files import write_jsonl

WORDS = "how many red green shapes are left of the square circle above number colour is which option".split()
FORM = "Answer the question using a single word or phrase."
LEAST = 3  # words of a question


class Kind(NamedTuple):
    """The lengths of a set of questions."""

    grids: Mapping[tuple[int, int], float]  # tokens across and down of a picture, and the share of such pictures
    questions: int  # on each picture
    words: float  # of a question on average: 3 and a Poisson number of more
    answer: float  # words of an answer on average: 1 and a Poisson number of more


class Row(NamedTuple):
    """One question."""

    picture: int
    grid: tuple[int, int]
    question: str
    answer: str


_COCO = {(23, 17): 0.45, (23, 15): 0.27, (17, 23): 0.18, (15, 23): 0.1}
_OPEN_IMAGES = {(18, 14): 0.52, (18, 12): 0.33, (18, 10): 0.08, (18, 18): 0.07}
KINDS = {
    # VQAv2 has 5.4 questions on a picture of COCO's: most are 640 × 480 or 640 × 427, one way or the other, at 28
    # pixels a token. 6.2 words a question; nine answers of ten are one word (VQA, arXiv 1505.00468).
    "shared": Kind(_COCO, questions=5, words=6.2, answer=1.15),
    # TextVQA: 7.18 words a question, 1.58 an answer (arXiv 1904.08920). Its pictures are OpenImages', 1024 pixels on
    # the long side, here half of that: 4:3, 3:2, 16:9 and square.
    "own": Kind(_OPEN_IMAGES, questions=1, words=7.18, answer=1.58),
    # A prompt of some 220 tokens.
    "grpo": Kind({(14, 14): 1.0}, questions=1, words=7.18, answer=1.0),
}


def draw(kind: Kind, pictures: int, seed: int = 0) -> list[Row]:
    """All questions on so many pictures."""
    rng = np.random.default_rng(seed)
    grids = [*kind.grids]
    chosen = rng.choice(len(grids), pictures, p=[*kind.grids.values()])

    def some(count: int) -> str:
        return " ".join(rng.choice(WORDS, count))

    return [
        Row(
            picture,
            grids[grid],
            some(LEAST + rng.poisson(kind.words - LEAST)),
            some(1 + rng.poisson(kind.answer - 1)),
        )
        for picture, grid in enumerate(chosen)
        for _ in range(kind.questions)
    ]


def write(folder: Path, rows: list[Row], unit: int) -> None:
    """`train.jsonl` and its pictures, in which a token is `unit` × `unit` pixels; for `test.jsonl` nobody asks."""
    rng = np.random.default_rng(1)
    (folder / "pictures").mkdir(parents=True)
    for picture, (across, down) in {row.picture: row.grid for row in rows}.items():
        pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((across * unit, down * unit)).save(folder / "pictures" / f"{picture}.jpg")
    for name, part in (("train", rows), ("test", rows[:1])):
        lines = [
            {
                "images": [f"pictures/{row.picture}.jpg"],
                "prompt": [{"role": "user", "content": f"{row.question}\n{FORM}"}],
                "completion": [{"role": "assistant", "content": row.answer}],
            }
            for row in part
        ]
        write_jsonl(folder / f"{name}.jsonl", lines)


def padding(kind: Kind, at_once: int, batch: int | None = None, batches: int = 500) -> float:
    """Of so many pictures at once, each padded to the longest, the share of places that are padding; text aside.

    With a `batch`, that many are sorted from long to short before they are dealt, as a stage does.
    """
    batch = batch or at_once
    pictures = {row.picture: row.grid for row in draw(kind, batch * batches)}
    tokens = np.array([across * down for across, down in pictures.values()]).reshape(batches, batch)
    dealt = -np.sort(-tokens, axis=1).reshape(-1, at_once)
    return float(1 - tokens.sum() / (dealt.max(1).sum() * at_once))
