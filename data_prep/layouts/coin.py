"""CoIN (arXiv 2403.08350), and what is laid out like it: UCIT and MLLM-DCL as MCITlib reads them.

- Source: annotations Hub `Zacks-Chen/CoIN` (CC-BY-4.0); images from ten datasets, each under its own terms.
- train.json: LLaVA JSON, one dialogue an image in GQA, VQAv2 and OCR-VQA. test.json or val.json: `question_id`, `text`,
  `answer`, `image` where there is one (code: `ETrain/Eval/LLaVA`). Grounding: `answer_bbox`, a list as text with four
  numbers from 0 to 1 of the image padded to a square, and `size` in pixels.
- Defects: the official grounding scorer loses the first and the last character of a box; the published ImageNet scorer
  calls an empty answer right. Our scorers do neither.
"""

from typing import Any


def row(raw: dict[str, Any], part: str) -> dict[str, Any]:
    """A training dialogue as it is; a test question with its one answer (none where `answers:` gives them)."""
    if "conversations" in raw:
        return raw
    answer = raw.get("answer_bbox", raw.get("answer"))
    test = {"id": raw["question_id"], "prompt": raw["text"], "image": raw.get("image")}
    if answer is not None:
        test["completion"] = str(answer)
    if "answer_bbox" in raw:
        test["meta"] = {"size": raw["size"]}
    return test
