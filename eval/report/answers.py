"""The browser of answers: of each task a few questions, chosen for what became of their answers, at every stage."""

import base64
import io
from collections import defaultdict
from collections.abc import Mapping
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

from mcit.data_prep.errors import InputError
from mcit.data_prep.files import read_json, read_jsonl
from mcit.data_prep.images import load_image

QUESTIONS = 24  # of each task: a page of five tasks with small pictures is some 700 kB
_LONGEST = 2000  # characters of an answer; the predictions file has all of it
_SIDE = 224  # pixels of a picture's longer side at most

Rows = Mapping[str, Mapping[str, Any]]  # of a predictions file, by id


def read_answers(run: Path, result: Mapping[str, Any]) -> dict[str, Any]:
    """What the page's script shows: per task, questions with their images and the answers after each stage."""
    tasks = {}
    for place, task in enumerate(result["tasks"]):
        stages = {
            stage["k"]: {row["id"]: row for row in read_jsonl(path)}
            for stage, scores in zip(result["stages"], result["matrix"], strict=True)
            if scores[place] is not None and (path := _predictions(run, stage["k"], task["name"])).exists()
        }
        if stages:
            learned = result["learned"].get(task["name"], max(stages))
            tasks[task["name"]] = {"learned": learned, "questions": _questions(run, task["name"], stages, learned)}
    return {"name": result["name"], "stages": [stage["name"] for stage in result["stages"]], "tasks": tasks}


def choose(before: Rows, after: Rows, count: int = QUESTIONS) -> list[str]:
    """`count` ids of `after`, in turn from each pair of verdicts (when learned → at the end), what was lost first.

    So every way in which answers changed is there to be looked at, however rare it is.
    """
    kinds: defaultdict[tuple[str, str], list[str]] = defaultdict(list)
    for name, row in after.items():
        kinds[before.get(name, row)["verdict"], row["verdict"]].append(name)
    lost_first = sorted(kinds, key=lambda kind: (kind[0] != "correct" or kind[1] == "correct", kind))
    turns = chain.from_iterable(zip_longest(*(kinds[kind] for kind in lost_first)))
    return [name for name in turns if name is not None][:count]


def _questions(run: Path, task: str, stages: Mapping[int, Rows], learned: int) -> list[dict[str, Any]]:
    last = stages[max(stages)]
    folder = run / "data" / task
    if not folder.exists():
        remedy = (
            f"Is the run a copy? It has links to prepared data: `mcit prepare {run}` makes them anew, `cp -L` copies"
        )
        raise InputError("is not there", where=folder, remedy=remedy)
    samples = {sample["id"]: sample for sample in read_jsonl(folder / "test.jsonl")}
    root = folder / read_json(folder / "task.json")["image_root"]
    return [
        {
            "prompt": samples[name]["prompt"][-1]["content"],
            "images": [thumbnail(root / image) for image in samples[name]["images"]],
            "references": last[name]["references"],
            "answers": {k: _answer(rows[name]) for k, rows in sorted(stages.items()) if name in rows},
        }
        for name in choose(stages.get(learned, last), last)
    ]


def _answer(row: Mapping[str, Any]) -> dict[str, Any]:
    """What is shown of one answer; what was asked under its form only where it differs."""
    held = row.get("constrained_response")
    shown = {"text": row["response"][:_LONGEST], "verdict": row["verdict"]}
    return shown if held is None or held == row["response"] else shown | {"held": held[:_LONGEST]}


def _predictions(run: Path, k: int, task: str) -> Path:
    return run / "predictions" / f"{k:02d}" / f"{task}.jsonl"


def thumbnail(path: Path) -> str:
    """An image as a data URI; one that says so where the image is gone."""
    try:
        image = load_image(path)
    except InputError:
        return _GONE
    image.thumbnail((_SIDE, _SIDE))
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=85)
    return data_uri("image/jpeg", buffer.getvalue())


def data_uri(kind: str, content: bytes) -> str:
    """`content` inside an address, so that the page needs no other file."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


_GONE = data_uri(
    "image/svg+xml",
    b'<svg xmlns="http://www.w3.org/2000/svg" width="128" height="128"><rect width="128" height="128" fill="#eee"/>'
    b'<text x="64" y="68" text-anchor="middle" font-family="sans-serif" font-size="13">image is gone</text></svg>',
)
