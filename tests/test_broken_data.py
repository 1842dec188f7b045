"""Broken benchmark files: one clear line, or under `on_bad: drop` a counted loss. Never a traceback, never silence."""

import io
import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mcit.data_prep.errors import InputError
from mcit.data_prep.gold import Answers
from mcit.data_prep.images import load_image
from mcit.data_prep.layouts import load_layout
from mcit.data_prep.prepare import prepare_task, read_samples, read_task
from mcit.data_prep.schema import LimitConfig, PrepareConfig, TaskConfig

FIXTURES = Path(__file__).parent / "fixtures"


@pytest.fixture
def ucit(tmp_path: Path) -> Path:
    return shutil.copytree(FIXTURES / "ucit", tmp_path / "ucit")


def prepare(root: Path, on_bad: Any = "error", **fields: Any) -> Path:
    folder = "instructions/ImageNet-R"
    defaults = {"train": f"{folder}/train.json", "test": f"{folder}/test_3000.json", "images": "datasets"}
    task = TaskConfig(**{"name": "t", "layout": "coin", "style": "short", **defaults, **fields})
    settings = PrepareConfig(limit=LimitConfig(), on_bad=on_bad)
    return prepare_task(task, settings, seed=0, asd=None, base_dir=root, cache=root / "cache")


def refusal(root: Path, **fields: Any) -> str:
    with pytest.raises(InputError) as error:
        prepare(root, **fields)
    assert "\n" not in str(error.value) and len(str(error.value)) < 600
    return str(error.value)


def edit(root: Path, name: str, at: int, **fields: Any) -> None:
    path = root / "instructions" / name
    rows = json.loads(path.read_text())
    rows[at] |= fields
    path.write_text(json.dumps(rows))


def dropped(root: Path, **fields: Any) -> str:
    """The note on the one sample that is dropped."""
    (note,) = [note for note in read_task(prepare(root, "drop", **fields))["notes"] if "bad samples dropped" in note]
    assert note.startswith("1 bad samples dropped; the first: ")
    return note


def test_a_file_that_breaks_off_is_refused_whatever_is_dropped(ucit):
    path = ucit / "instructions" / "ImageNet-R" / "train.json"
    path.write_text(path.read_text()[:200])
    for on_bad in ("error", "drop"):
        assert "malformed JSON" in (line := refusal(ucit, on_bad=on_bad)) and "half-written" in line


def test_a_file_that_was_published_broken_names_the_way_out(ucit):
    path = ucit / "instructions" / "ImageNet-R" / "train.json"
    path.write_text(path.read_text().replace('"kite"', '"kite'))
    assert "prepare.on_bad: drop passes over what is broken" in refusal(ucit)
    folder = prepare(ucit, "drop")
    assert len(read_samples(folder, "train")) == 1
    assert any(note.startswith("1 stretches that are not JSON") for note in read_task(folder)["notes"])


def test_bare_line_breaks_in_strings_are_read(ucit):
    path = ucit / "instructions" / "ImageNet-R" / "train.json"
    path.write_text(path.read_text().replace("\\nAnswer", "\nAnswer"))
    assert "malformed JSON" in refusal(ucit)
    assert len(read_samples(prepare(ucit, "drop"), "train")) == 2


def test_not_utf_8(ucit):
    path = ucit / "instructions" / "ImageNet-R" / "train.json"
    path.write_bytes(path.read_bytes().replace(b"kite", b"caf\xe9"))
    assert "train.json: is not UTF-8 (byte " in refusal(ucit)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("../../etc/passwd", "the image path '../../etc/passwd' leaves the image folder"),
        ("/etc/passwd", "leaves the image folder"),
        ("https://example.org/a.jpg", "the image is a URL"),
        ("a\ud800.jpg", r"the image path 'a\ud800.jpg' is no text"),
        ("x" * 5000 + ".jpg", "no such image"),
        ("ImageNet-R/train/gone.jpg", "no such image"),
    ],
)
def test_bad_image_names(name, message, ucit):
    edit(ucit, "ImageNet-R/train.json", 0, image=name)
    with pytest.raises(InputError, match="sample 1 ") as error:
        prepare(ucit)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert "the first: " in dropped(ucit)


def test_a_truncated_jpeg_and_one_in_cmyk(ucit):
    first, second = (ucit / "datasets" / "ImageNet-R" / "train" / name for name in ("n01/a.jpg", "n02/b.jpg"))
    buffer = io.BytesIO()
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(buffer, "JPEG")
    second.write_bytes(buffer.getvalue())
    folder = prepare(ucit)
    assert len(read_samples(folder, "train")) == 2
    red, green, _ = load_image(second).getpixel((4, 4))
    assert load_image(second).mode == "RGB" and red > 200 and green < 60
    first.write_bytes(first.read_bytes()[:-200])
    assert "the image cannot be decoded" in refusal(ucit)
    assert "the image cannot be decoded" in dropped(ucit)


def test_ten_megabytes_of_answer(ucit):
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "no " * 3_500_000}]
    edit(ucit, "ImageNet-R/train.json", 1, conversations=turns)
    assert "conversations[1]: 10500000 characters in one turn" in refusal(ucit)
    assert "characters in one turn" in dropped(ucit)


def test_what_is_no_text_is_told_in_text(ucit):
    edit(ucit, "ImageNet-R/train.json", 0, id="\ud800")
    assert r"sample 1 (id \ud800): cannot be written as JSON" in refusal(ucit)
    assert r"(id \ud800)" in dropped(ucit)
    edit(ucit, "ImageNet-R/train.json", 0, id="7" * 1_000_000, style="s" * 1_000_000)
    with pytest.raises(InputError, match=r"unknown value 's+…") as error:
        prepare(ucit)
    assert len(str(error.value)) < 3000
    edit(ucit, "ImageNet-R/train.json", 0, id="1", style=None, conversations=[{"from": ["human"], "value": "?"}])
    assert "conversations[0]: unknown role ['human']" in refusal(ucit)


def test_a_row_that_is_null_is_a_bad_sample_and_not_one_of_another_part(ucit):
    path = ucit / "instructions" / "ImageNet-R" / "train.json"
    path.write_text(json.dumps([None, *json.loads(path.read_text())]))
    for layout in (None, "coin"):
        assert "sample 1: a sample is an object, not null" in refusal(ucit, layout=layout)
    folder = prepare(ucit, "drop", layout=None, test=0.5)
    assert not any("another part" in note for note in read_task(folder)["notes"])
    assert "a sample is an object" in dropped(ucit)


def test_rows_of_another_layout(ucit):
    edit(ucit, "ImageNet-R/test_3000.json", 1, question_id=None)
    path = ucit / "instructions" / "ImageNet-R" / "test_3000.json"
    path.write_text(path.read_text().replace('"text"', '"query"'))
    assert "test_3000.json: sample 1: has no field 'text', so it is not of the layout coin" in refusal(ucit)
    rows = [[], "text", 7, None]
    path.write_text(json.dumps(rows))
    assert "test_3000.json: sample 1" in refusal(ucit)


@pytest.mark.parametrize(
    ("layout", "document", "message"),
    [
        ("superclevr", {"info": {}}, "the layout finds no rows in it: KeyError: 'questions'"),
        ("gqa", {"201": 7}, "the layout finds no rows in it: TypeError"),
        ("superclevr", {"questions": [{"image_filename": "none.png"}]}, "sample 1: the layout superclevr cannot read"),
        ("superclevr", {"questions": 7}, "the layout finds no rows in it"),
    ],
)
def test_an_object_of_another_form_than_its_layout_wants(layout, document, message, tmp_path):
    (tmp_path / "all.json").write_text(json.dumps(document))
    assert message in refusal(tmp_path, train="all.json", test="all.json", images=None, layout=layout)


def test_an_unknown_layout_and_one_of_the_users_own(ucit):
    assert refusal(ucit, layout="coyn").startswith("unknown layout 'coyn'. Known: coin, coin_asd, ctbench, dcl, ")
    (ucit / "my_broken_layout.py").write_text(
        "def mine(raw, part):\n    return {'prompt': part, 'completion': f\"n{raw['question_id']}\"}\n"
    )
    with pytest.raises(
        InputError, match="has no field 'question_id', so it is not of the layout my_broken_layout:mine"
    ):
        prepare(ucit, layout="my_broken_layout:mine")
    folder = prepare(ucit, layout="my_broken_layout:mine", train="instructions/ImageNet-R/test_3000.json")
    assert [sample["completion"][0]["content"] for sample in read_samples(folder, "train")] == ["n0", "n1"]


# --- Files of answers -------------------------------------------------------------------------------------------------


def write(folder: Path, value: Any) -> Path:
    path = folder / "answers.json"
    path.write_text(json.dumps(value))
    return path


@pytest.mark.parametrize(
    ("document", "key", "expected"),
    [
        ({"data": [{"question_id": 5, "answers": ["a", "b"]}]}, 5, ["a", "b"]),
        ([{"question_id": "x", "solution": "<think>t</think> <answer>7</answer>"}], "x", ["7"]),
        ([{"id": 7, "answers": [{"answer": "yes"}, {"answer": " "}]}], 7, ["yes"]),
        ({"12": {"choices": ["p", "q"], "answer": 1}}, 12, ["B"]),
        ({"12": {"question": "?", "answer": "blue"}}, "12", ["blue"]),
    ],
)
def test_answers_by_id(document, key, expected, tmp_path):
    row = Answers(write(tmp_path, document)).give({"id": key, "prompt": "?"}, 1, "here")
    assert row["references"] == expected and row["completion"] == expected[0]


def test_a_question_without_an_answer_is_refused(tmp_path):
    answers = Answers(write(tmp_path, {"3": {"answer": "a"}, "4": {"question": "of a test set without answers"}}))
    for identity in ("4", "5", None):
        with pytest.raises(InputError, match=rf"here: answers: no answer to the question of id {identity} in .*json"):
            answers.give({"id": identity}, 3, "here")


def test_captions_that_do_not_fit_the_test_file_are_refused(tmp_path):
    captions = [{"image_id": number, "caption": "c"} for number in (1, 2, 2)]
    answers = Answers(write(tmp_path, {"annotations": captions}))
    answers.check_places(2)
    with pytest.raises(InputError, match="holds captions of 2 images, and the test file has 3 rows"):
        answers.check_places(3)
    with pytest.raises(InputError, match="image_id is not 1 to 1"):
        Answers(write(tmp_path, {"annotations": [{"image_id": 391895, "caption": "c"}]}))
    with pytest.raises(InputError, match="no image_id and caption in"):
        Answers(write(tmp_path, {"annotations": ["c"]}))
    with pytest.raises(InputError, match="is neither a list nor an object"):
        Answers(write(tmp_path, "c"))


def test_a_pattern_that_matches_nothing_and_an_archive_that_is_none(ucit):
    assert "no file matches" in refusal(ucit, train="data/train-*.parquet")
    (ucit / "img.zip").write_bytes(b"PK\x03\x04half")
    assert "img.zip: images: cannot be unpacked" in refusal(ucit, images="img.zip")
    assert "img2.zip: images: no such file" in refusal(ucit, images="img2.zip")
    assert load_layout(None, ucit).read({"a": 1}, "train", "here") == {"a": 1}


def corrupted(data: bytearray) -> None:
    data[60:200] = bytes(byte ^ 0x5A for byte in data[60:200])


def encrypted(data: bytearray) -> None:
    """Set the flag of each entry in both of its headers."""
    flag(data, b"PK\x03\x04", 6, 1)
    flag(data, b"PK\x01\x02", 8, 1)


def packed_in_an_unknown_way(data: bytearray) -> None:
    flag(data, b"PK\x03\x04", 8, 97)
    flag(data, b"PK\x01\x02", 10, 97)


def flag(data: bytearray, header: bytes, offset: int, value: int) -> None:
    at = -1
    while (at := data.find(header, at + 1)) >= 0:
        data[at + offset] = value


@pytest.mark.parametrize("damage", [corrupted, encrypted, packed_in_an_unknown_way])
def test_an_archive_that_cannot_be_unpacked_is_one_line_and_leaves_nothing_behind(damage, ucit):
    with zipfile.ZipFile(ucit / "img.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.txt", "".join(chr(33 + number * 7919 % 90) for number in range(1000)))
    data = bytearray((ucit / "img.zip").read_bytes())
    damage(data)
    (ucit / "img.zip").write_bytes(data)
    assert "img.zip: images: cannot be unpacked: " in refusal(ucit, images="img.zip")
    assert list((ucit / "cache" / "archives").iterdir()) == []
