"""How far a judge agrees with ratings: rank and linear correlations, with bootstrap intervals."""

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import numpy as np

from mcit.data_prep.errors import InputError
from mcit.data_prep.readers import iter_jsonl

from ..stats import LEVEL, image_clusters
from .prompts import Unreadable, read_verdict
from .rubrics import DIMENSIONS, Dimension

RESAMPLES = 1_999
_FEWEST = 3  # pairs that have a correlation worth the name


class Correlation(TypedDict):
    """A coefficient in −1…1 and its 95 % interval; None where it is undefined, as of ratings that are all the same."""

    value: float | None
    low: float | None
    high: float | None


class Agreement(TypedDict):
    """Of one dimension, or of the final score."""

    n: int  # pairs
    spearman: Correlation
    pearson: Correlation
    kendall: Correlation  # τ_b
    distance: float  # mean |judge − rating|, in points


class Rated(NamedTuple):
    """The scores of one reasoning."""

    scores: Mapping[Any, float]  # of the dimensions there are, and "score", their mean
    cluster: Hashable  # what it is about: image, or the sample that several were made of


class Agreements(TypedDict):
    """What `mcit agreement` prints."""

    pairs: int
    unscored: int  # of the judge's lines, those without a readable verdict
    unrated: int  # those that no rating is known for
    agreement: dict[str, Agreement]  # by dimension, and "score"


def agreement_files(judged: Path, rated: Path | None) -> Agreements:
    """Compare a judge's scores with ratings, matched by id.

    A line holds `id` and scores: `logic`, `grounding`, `knowledge` (what applies), as in `RUN/judgements/…` or in
    `ratings`; or `response`, a verdict as JSON, with the rating among its `references`, as a judge's own run predicts
    them. Only of the latter kind of file `rated` may be missing. Raises `InputError`.
    """
    lines = list(_lines(judged))
    ratings = {name: _scores(line) for name, line in _lines(rated)} if rated else None
    pairs: list[tuple[Rated, Rated]] = []
    unscored = unrated = 0
    for name, line in lines:
        gold = ratings.get(name) if ratings is not None else _verdict(line, _first(line.get("references")))
        said = _verdict(line, line.get("response")) if ratings is None else _scores(line)
        if gold is None:
            unrated += 1
        elif said is None:
            unscored += 1
        else:
            pairs.append((said, gold))
    if not pairs:
        raise InputError("no line has both a verdict and a rating", where=judged)
    return {"pairs": len(pairs), "unscored": unscored, "unrated": unrated, "agreement": agreement(pairs)}


def agreement(pairs: Sequence[tuple[Rated, Rated]]) -> dict[str, Agreement]:
    """Spearman's ρ, Pearson's r and Kendall's τ_b of (judge, rating) pairs, by dimension and of the final score.

    Intervals hold the middle 95 % of 1,999 resamples in which the clusters are drawn anew (cluster bootstrap: Efron &
    Tibshirani, "An Introduction to the Bootstrap", 1993, ch. 8); resamples in which a coefficient is undefined do not
    count. The final score of either side is the mean over the dimensions that both have.
    """
    found = {}
    for name in (*DIMENSIONS, "score"):
        both = [
            (one.scores[name], other.scores[name], one.cluster)
            for one, other in map(_common, pairs)
            if name in one.scores
        ]
        if len(both) >= _FEWEST:
            found[name] = _agreement(np.array([pair[:2] for pair in both]), [pair[2] for pair in both])
    return found


def _common(pair: tuple[Rated, Rated]) -> tuple[Rated, Rated]:
    """Both with the dimensions that both have, and the mean of these."""
    names = [name for name in DIMENSIONS if all(name in side.scores for side in pair)]
    cluster = pair[1].cluster

    def side(rated: Rated) -> Rated:
        scores = {name: rated.scores[name] for name in names}
        return Rated(scores | ({"score": math.fsum(scores.values()) / len(scores)} if scores else {}), cluster)

    return side(pair[0]), side(pair[1])


def _agreement(values: np.ndarray, clusters: Sequence[Hashable]) -> Agreement:
    """`values` [pairs, 2]."""
    from scipy.stats import kendalltau, rankdata  # here: takes a second, and most commands do not need it

    def pearson(pairs: np.ndarray) -> float:
        one, other = (pairs - pairs.mean(axis=0)).T
        length = math.sqrt(float((one**2).sum() * (other**2).sum()))
        return float((one * other).sum()) / length if length > 1e-9 else math.nan

    def spearman(pairs: np.ndarray) -> float:
        return pearson(rankdata(pairs, axis=0))

    def kendall(pairs: np.ndarray) -> float:
        return float(kendalltau(pairs[:, 0], pairs[:, 1]).statistic)

    drawn = _resamples(clusters)
    return {
        "n": len(values),
        "spearman": _correlation(values, drawn, spearman),
        "pearson": _correlation(values, drawn, pearson),
        "kendall": _correlation(values, drawn, kendall),
        "distance": float(np.abs(values[:, 0] - values[:, 1]).mean()),
    }


def _resamples(clusters: Sequence[Hashable]) -> list[np.ndarray]:
    """The rows of each resample; none for fewer than two clusters."""
    rows: dict[Hashable, list[int]] = {}
    for row, cluster in enumerate(clusters):
        rows.setdefault(cluster, []).append(row)
    groups = [np.array(group) for group in rows.values()]
    if len(groups) < 2:
        return []
    generator = np.random.default_rng(0)
    draws = generator.integers(len(groups), size=(RESAMPLES, len(groups)))
    return [np.concatenate([groups[place] for place in draw]) for draw in draws]


def _correlation(
    values: np.ndarray, drawn: Sequence[np.ndarray], coefficient: Callable[[np.ndarray], float]
) -> Correlation:
    value = coefficient(values)
    if math.isnan(value):
        return {"value": None, "low": None, "high": None}
    resampled = [found for rows in drawn if not math.isnan(found := coefficient(values[rows]))]
    if not resampled:
        return {"value": value, "low": None, "high": None}
    low, high = np.percentile(resampled, [50 * (1 - LEVEL), 50 * (1 + LEVEL)]).tolist()
    return {"value": value, "low": low, "high": high}


def _lines(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """The lines of a file with their ids."""
    if not path.is_file():
        raise InputError("no such file", where=path)
    found: list[tuple[str, dict[str, Any]]] = []
    for where, line in iter_jsonl(path):
        if not isinstance(line, dict) or line.get("id") is None:
            raise InputError("has no id", where=where)
        found.append((str(line["id"]), line))
    if len({name for name, _ in found}) < len(found):
        raise InputError("an id occurs twice", where=path, remedy="Compare one cell at a time")
    return found


def _first(references: Any) -> Any:
    return references[0] if isinstance(references, list) and references else None


def _scores(line: Mapping[str, Any]) -> Rated | None:
    """The scores of a line that has them by dimension; None where it has none."""
    given = line.get("ratings", line)
    if not isinstance(given, dict):
        raise InputError("is not an object", where=f"line of {line['id']}", field="ratings")
    scores: dict[str, float] = {name: given[name] for name in DIMENSIONS if given.get(name) is not None}
    for name, value in scores.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 100:
            raise InputError(f"is {value!r}", where=f"line of {line['id']}", field=name, remedy="Scores lie in 0–100")
    return Rated(scores, _cluster(line)) if scores else None


def _verdict(line: Mapping[str, Any], text: Any) -> Rated | None:
    """The scores of a verdict written as JSON; None where it is not one."""
    dimensions: tuple[Dimension, ...] = tuple(name for name in DIMENSIONS if f'"{name}"' in str(text))
    if not dimensions:
        return None
    try:
        return Rated(read_verdict(str(text), dimensions).scores, _cluster(line))
    except Unreadable:
        return None


def _cluster(line: Mapping[str, Any]) -> Hashable:
    image = line.get("image_id") or line.get("source")
    return image_clusters([image])[0] if image else ("row", line["id"])
