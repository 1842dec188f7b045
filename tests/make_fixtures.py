"""The fixtures that are no text: Parquet files in the published schemas, with pictures inside, and an archive.

`python tests/make_fixtures.py` writes them again. All rows are ours; pictures are plain colours.
"""

import io
import zipfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

FIXTURES = Path(__file__).parent / "fixtures"
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
PICTURES = [
    *("art_vqa_datasets/AQUA/test/p3.jpg", "art_vqa_datasets/AQUA/train/p1.jpg", "art_vqa_datasets/AQUA/train/p2.jpg"),
    *("OCR_datasets/CROHME/1.png", "OCR_datasets/chart/3.png", "OCR_datasets/scene/2.png"),
    *("math_vqa_datasets/b/2.png", "math_vqa_datasets/g/1.png", "math_vqa_datasets/g/5.png"),
    *("math_vqa_datasets/q/3.png", "math_vqa_datasets/q/4.png"),
    *(f"medical_vqa_datasets/{n}.png" for n in (1, 2, 3)),
    *(f"science_vqa_datasets/{n}.png" for n in (1, 2, 3, 4)),
]


def picture(shade: int, form: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (6, 5), (shade * 37 % 256, shade * 91 % 256, shade * 53 % 256)).save(buffer, form)
    return buffer.getvalue()


def image(shade: int) -> dict[str, Any]:
    return {"bytes": picture(shade), "path": "x.png"}


def science_qa(question: str, answer: int, hint: str = "", shown: Any = None) -> dict[str, Any]:
    empty = dict.fromkeys(("task", "grade", "subject", "topic", "category", "skill", "lecture", "solution"), "")
    choices = ["a magnet", "a spoon", "a sponge"]
    return {"image": shown, "question": question, "choices": choices, "answer": answer, "hint": hint} | empty


def text_vqa(number: int, question: str, answers: list[str]) -> dict[str, Any]:
    return {"image_id": f"t{number}", "question_id": number, "question": question, "image": image(number)} | {
        "answers": answers
    }


def mmmu(identity: str, question: str, options: str, answer: str, kind: str, images: int) -> dict[str, Any]:
    shown = {f"image_{n}": image(n) if n <= images else None for n in range(1, 8)}
    return {"id": identity, "question": question, "options": options, "answer": answer, "question_type": kind} | shown


def pope(category: str, question: str, answer: str, shade: int) -> dict[str, Any]:
    return {"id": str(shade), "question_id": 1, "question": question, "answer": answer, "category": category} | {
        "image": image(shade)
    }


def tables() -> dict[str, list[dict[str, Any]]]:
    """The rows of each file."""
    numbers = ["54", "56", "58", "60", "62", "64", "66", "68", "70", "72"]
    product = {
        "question_id": 70,
        "question": "What is 7 times 8?",
        "options": numbers,
        "answer": "B",
        "answer_index": 1,
    }
    return {
        "rft7/ScienceQA/data/train-00000-of-00001-abc.parquet": [
            science_qa("Which of these sticks to iron?", 0, "Look at the picture.", image(1)),
            science_qa("Which of these holds soup?", 1),
        ],
        "rft7/ScienceQA/data/test-00000-of-00001-abc.parquet": [science_qa("Which of these is soft?", 2, "", image(2))],
        "rft7/TextVQA/data/train-00000-of-00002.parquet": [
            text_vqa(0, "what does the sign say?", ["open"] * 8 + ["open daily"] * 2)
        ],
        "rft7/TextVQA/data/train-00001-of-00002.parquet": [text_vqa(1, "what number is it?", ["9"] * 10)],
        "rft7/TextVQA/data/validation-00000-of-00001.parquet": [
            text_vqa(2, "what is on the door?", ["exit"] * 6 + ["way out"] * 4)
        ],
        "rft7/Geometry3K/data/train-00000-of-00001.parquet": [
            {"images": [image(3)], "problem": "<image>Find x.", "answer": "12"},
            {"images": [image(4)], "problem": "<image>Find the length of AB.", "answer": "2 \\sqrt { 13 }"},
        ],
        "rft7/Geometry3K/data/test-00000-of-00001.parquet": [
            {"images": [image(5)], "problem": "<image>Find y.", "answer": "\\frac { 5 } { 2 }"}
        ],
        "rft7/PathVQA/data/train-00000-of-00001-d1.parquet": [
            {"image": image(6), "question": "what is stained?", "answer": "the nucleus"},
            {"image": image(7), "question": "is the border sharp?", "answer": "no"},
        ],
        "rft7/PathVQA/data/test-00000-of-00001-e2.parquet": [
            {"image": image(8), "question": "is the tissue stained?", "answer": "yes"}
        ],
        "probes/pope/data/test-00000-of-00001.parquet": [
            pope("random", "Is there a dog in the image?", "yes", 0),
            pope("popular", "Is there a boat in the image?", "no", 1),
        ],
        "probes/mmmu/Art/validation-00000-of-00001.parquet": [
            mmmu(
                "validation_Art_1",
                "Which of these is older, <image 1> or <image 2>?",
                "['<image 1>', '<image 2>']",
                "B",
                "multiple-choice",
                2,
            )
        ],
        "probes/mmmu/Math/validation-00000-of-00001.parquet": [
            mmmu("validation_Math_1", "<image 1> How long is x?", "[]", "['4', '4 cm']", "open", 1)
        ],
        "probes/mmlu_pro/data/test-00000-of-00001.parquet": [
            product | {"cot_content": "", "category": "math", "src": ""}
        ],
    }


def table(rows: list[dict[str, Any]]) -> pa.Table:
    """Rows as a table in which every picture has the Hub's type, also where a file has none."""
    schema = pa.Table.from_pylist(rows).schema
    types = {name: pa.list_(IMAGE) if name == "images" else IMAGE for name in schema.names if name.startswith("image")}
    types.pop("image_id", None)
    fields = [pa.field(field.name, types.get(field.name, field.type)) for field in schema]
    return pa.Table.from_pylist(rows, schema=pa.schema(fields))


def main() -> None:
    for name, rows in tables().items():
        path = FIXTURES / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table(rows), path, write_statistics=False)
    with zipfile.ZipFile(FIXTURES / "ctbench" / "img.zip", "w") as archive:
        for shade, name in enumerate(PICTURES):
            form = "JPEG" if name.endswith("jpg") else "PNG"
            archive.writestr(zipfile.ZipInfo(name), picture(shade, form))


if __name__ == "__main__":
    main()
