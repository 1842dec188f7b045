"""A cell's answers, scored: a row a sample, with what each way of asking gave, and what the marker says of them all."""

from collections.abc import Mapping, Sequence
from typing import Any

from mcit.data_prep.schema import Sample

from .asking import Kind
from .constraints import Constraint, constraint_of
from .forgetting import above_chance, knowledge
from .scorers import Scorer
from .scoring import score_response, set_score
from .stats import clustered_stderr, image_clusters, mean

Row = dict[str, Any]
Answers = Mapping[Kind, Mapping[str, Row]]  # by the sample's id


def score_sheet(
    samples: Sequence[Sample], answers: Answers, scorer: Scorer, choices: Sequence[str] | None
) -> list[Row]:
    """The rows of a predictions file. What was not asked has no key there, but for `constrained_score` (None)."""
    chances = _Chances(scorer)
    rows = []
    for sample in samples:
        answer, meta = answers["free"][sample["id"]], sample.get("meta") or {}
        row = {
            "id": sample["id"],
            "prompt": answer["prompt"],
            "response": answer["text"],
            "references": sample["references"],
            "style": sample["style"],
            "reasoning": sample["reasoning"],
            "options": meta.get("options"),
            "constrained_score": None,
            **score_response(sample, answer["text"], scorer, answer["finished"]),
            "image_id": meta.get("image_id"),
            "finished": answer["finished"],
            "tokens": answer["tokens"],
        }
        if "constrained" in answers:
            held = answers["constrained"].get(sample["id"])
            form = constraint_of(sample, choices) if held else None
            row["constrained_response"] = held["text"] if held else None
            row["constrained_score"] = _score(sample, held, scorer)
            row["chance"] = chances.of(sample, form) if form else None
        if "gold" in answers:
            gold = answers["gold"].get(sample["id"])
            row["gold_logprob"], row["gold_tokens"] = (gold["logprob"], gold["tokens"]) if gold else (None, None)
        for kind in ("swapped", "blank"):
            if kind in answers:
                row[f"{kind}_score"] = _score(sample, answers[kind].get(sample["id"]), scorer)
        rows.append(row)
    return rows


def _score(sample: Sample, answer: Row | None, scorer: Scorer) -> float | None:
    return score_response(sample, answer["text"], scorer, answer["finished"])["score"] if answer else None


class _Chances:
    """What a guess is worth, 0–1: the mean score of the closed set's choices; 0 where there is no closed set.

    For one right answer among n choices that is 1/n. Questions with the same choices and references share it.
    """

    def __init__(self, scorer: Scorer):
        self.scorer, self.known = scorer, dict[Any, float]()

    def of(self, sample: Sample, form: Constraint) -> float:
        key = (form.choices, *sample["references"])
        if key not in self.known:
            bare: Sample = {**sample, "reasoning": "none"}
            scores = [score_response(bare, choice, self.scorer)["score"] for choice in form.choices]
            self.known[key] = mean(scores) / 100 if scores else 0.0
        return self.known[key]


def summaries(rows: Sequence[Row], scorer: Scorer, kinds: Sequence[Kind]) -> dict[str, Any]:
    """What a cell's marker holds beside score and verdicts: a figure, or a mapping of figures, for what was asked."""
    content = [{**row, "score": row["content_score"], "format_ok": True} for row in rows]
    found: dict[str, Any] = {"content": set_score(content, scorer)[0]}
    if "constrained" in kinds:
        found["constrained"] = _constrained([row for row in rows if row["chance"] is not None])
    if "gold" in kinds:
        scored = [row for row in rows if row["gold_tokens"]]
        tokens = sum(row["gold_tokens"] for row in scored)
        found["nll"] = -sum(row["gold_logprob"] for row in scored) / tokens if tokens else None
    if "swapped" in kinds:
        found["images"] = {
            "n": sum(row["swapped_score"] is not None for row in rows),
            **{name: _mean([row[key] for row in rows if row["swapped_score"] is not None]) for name, key in _IMAGES},
        }
    return found


_IMAGES = (("true", "score"), ("swapped", "swapped_score"), ("blank", "blank_score"))


def _mean(values: Sequence[float]) -> float | None:
    return mean(values) if values else None


def _constrained(rows: Sequence[Row]) -> dict[str, Any] | None:
    """Of the rows that have a constraint: the score under it, and what is shown and known beyond chance."""
    if not rows:
        return None
    known = [above_chance(row["constrained_score"], row["chance"]) for row in rows]
    shown_mean, known_mean = knowledge(rows)
    return {
        "n": len(rows),
        "score": mean([row["constrained_score"] for row in rows]),
        "shown": shown_mean,
        "known": known_mean,
        "known_stderr": clustered_stderr(known, image_clusters(row["image_id"] for row in rows)),
    }
