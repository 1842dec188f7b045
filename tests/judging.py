"""A run with chains of thought as evaluation leaves it, for the tests of judging: no model, no training."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from mcit.data_prep.files import write_json, write_jsonl
from mcit.data_prep.schema import Sample
from mcit.eval.scorers import get_scorer
from mcit.eval.scoring import score_response
from mcit.eval.serving import Serving, write_serving

STAGES = [{"k": 1, "name": "art", "tasks": ["art"]}, {"k": 2, "name": "sums", "tasks": ["sums"]}]
LEARNED = {"art": 1, "sums": 2}


def said(think: str, answer: str = "yes") -> str:
    return f"<think>{think}</think><answer>{answer}</answer>"


def make_task(run: Path, name: str, count: int, images: bool = True) -> list[Sample]:
    """Yes/no questions that ask for reasoning; two samples share an image."""
    folder = run / "data" / name
    (folder / "images").mkdir(parents=True)
    facts = {}
    for i in range(count // 2 if images else 0):
        file = folder / "images" / f"{i}.png"
        Image.new("RGB", (8, 8), (i, 0, 0)).save(file)
        facts[f"images/{i}.png"] = [hashlib.sha256(file.read_bytes()).hexdigest(), 8, 8]
    samples: list[Sample] = [
        {
            "id": f"{name}-{i}",
            "task": name,
            "images": [f"images/{i // 2}.png"] if images else [],
            "prompt": [{"role": "user", "content": f"Is it {i}?\nAnswer with yes or no."}],
            "completion": [{"role": "assistant", "content": said("Because.")}],
            "references": ["yes"],
            "style": "yes_no",
            "reasoning": "think",
            "meta": {"image_id": f"image-{i // 2}"} if images else {},
        }
        for i in range(count)
    ]
    write_jsonl(folder / "test.jsonl", samples)
    write_json(folder / "images.json", facts)
    task = {"name": name, "style": "yes_no", "reasoning": "think", "scorer": "yes_no", "reward": "same"}
    task |= {"image_root": ".", "counts": {"test": count}, "notes": [], "hash": f"data-{name}"}
    write_json(folder / "task.json", task | {"test_hash": f"test-{name}"})
    return samples


def make_stages(run: Path) -> None:
    for k, name in enumerate(["base", *LEARNED]):
        kind = "adapter" if k else "base"
        serving = Serving(stage=k, name=name, kind=kind, base="b", base_hash="h0", hash=f"h{k}")
        write_serving(run / "stages" / f"{k:02d}-{name}", serving)


def write_answers(
    run: Path, stage: int, samples: Sequence[Sample], responses: Mapping[str, str] | str, cut: Sequence[str] = ()
) -> None:
    """The predictions of a cell: `responses` by id, or one for all; those in `cut` ended at the token limit."""
    rows: list[dict[str, Any]] = []
    for sample in samples:
        text = responses if isinstance(responses, str) else responses[sample["id"]]
        finished = sample["id"] not in cut
        score = score_response(sample, text, get_scorer("yes_no"), finished)
        known = {"id": sample["id"], "response": text, "references": sample["references"], "finished": finished}
        rows.append(known | {"image_id": (sample.get("meta") or {}).get("image_id"), **score})
    name, folder = samples[0]["task"], run / "predictions" / f"{stage:02d}"
    write_jsonl(folder / f"{name}.jsonl", rows)
    mean = sum(row["score"] for row in rows) / len(rows)
    marker = {"fingerprint": "f", "n": len(rows), "score": mean, "stderr": 1.0, "verdicts": {}, "seconds": 1.0}
    write_json(folder / f"{name}.done.json", marker | {"policy_hash": f"h{stage}", "data_hash": f"test-{name}"})
