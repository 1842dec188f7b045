"""Preparation: what lands in a prepared task, the cache, the split, the limit, and what is refused."""

import io
import json
import os
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mcit.data_prep.errors import InputError
from mcit.data_prep.files import read_json
from mcit.data_prep.identity import connect
from mcit.data_prep.images import load_image
from mcit.data_prep.prepare import drop_samples, image_path, prepare_task, read_images, read_samples, read_task
from mcit.data_prep.schema import AsdConfig, LimitConfig, PrepareConfig, TaskConfig
from mcit.data_prep.styles import THINK


def picture(path: Path, shade: int, mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (4 + shade % 3, 5), shade).convert(mode).save(path)


def row(question: str, answer: str, image: str | list[str] | None = None, **fields: Any) -> dict[str, Any]:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"conversations": turns, **({"image": image} if image else {}), **fields}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """40 questions on 20 images, two for each, in LLaVA JSON."""
    rows = []
    for number in range(20):
        picture(tmp_path / "img" / f"{number}.png", number * 10)
        for question in ("How bright?", "How dark?"):
            rows.append(row(f"<image>\n{question}", str(number), f"{number}.png"))
    (tmp_path / "train.json").write_text(json.dumps(rows))
    return tmp_path


def prepare(
    root: Path, *, seed: int = 0, asd: AsdConfig | None = None, limit: Any = None, on_bad="error", **task
) -> Path:
    config = TaskConfig(**{"name": "t", "train": "train.json", "images": "img", **task})
    settings = PrepareConfig(limit=LimitConfig(**(limit or {})), on_bad=on_bad)
    return prepare_task(config, settings, seed=seed, asd=asd, base_dir=root, cache=root / "cache")


def test_a_prepared_task(data: Path) -> None:
    folder = prepare(data, style="number", test="train.json")
    task = read_task(folder)
    assert task["counts"] == {"train": 40, "validation": 0, "test": 40}
    assert (task["name"], task["style"], task["scorer"], task["reward"]) == ("t", "number", "number", "same")
    assert task["image_root"] == str(data / "img")
    first = read_samples(folder, "train")[0]
    image_id = first["meta"].pop("image_id")
    assert first == {
        "id": first["id"],
        "task": "t",
        "images": ["0.png"],
        "prompt": [{"role": "user", "content": "How bright?"}],
        "completion": [{"role": "assistant", "content": "0"}],
        "references": ["0"],
        "style": "number",
        "reasoning": "none",
        "meta": {},
    }
    assert read_samples(folder, "train")[1]["meta"]["image_id"] == image_id
    assert read_samples(folder, "validation") == []
    assert image_path(folder, task, "0.png") == data / "img" / "0.png"
    assert read_images(folder)["1.png"][1:] == (5, 5)
    assert "40 of 40 test samples show an image that train shows too" in task["notes"]


def test_missing_style_scorer_and_test_set_are_inferred_and_noted(data: Path) -> None:
    task = read_task(prepare(data))
    assert (task["style"], task["scorer"]) == ("number", "number")
    assert task["notes"] == [
        "style inferred from the answers: number",
        "no test set given: 4 samples split off, those of 2 of 20 images or questions",
        "scorer inferred from the style: number",
    ]


def test_split_keeps_the_samples_of_an_image_together(data: Path) -> None:
    folder = prepare(data, test=0.3)
    parts = {part: read_samples(folder, part) for part in ("train", "test")}
    images = {part: {image for sample in rows for image in sample["images"]} for part, rows in parts.items()}
    assert not images["train"] & images["test"] and len(images["test"]) == 6 and len(parts["test"]) == 12


def test_split_depends_on_content_alone(data: Path) -> None:
    first = {sample["id"] for sample in read_samples(prepare(data, seed=0), "test")}
    rows = json.loads((data / "train.json").read_text())
    random.Random(0).shuffle(rows)
    (data / "train.json").write_text(json.dumps(rows))
    assert {sample["id"] for sample in read_samples(prepare(data, seed=5), "test")} == first


def test_split_sees_that_two_files_are_one_image(data: Path) -> None:
    rows = [row(f"q{i}", "1", f"copy{i}.png") for i in range(12)] + [row("q", "1", "other.png")]
    for i in range(12):
        picture(data / "img" / f"copy{i}.png", 99)
    picture(data / "img" / "other.png", 100)
    (data / "train.json").write_text(json.dumps(rows))
    folder = prepare(data, test=0.5)
    assert sorted(read_task(folder)["counts"].values()) == [0, 1, 12]


def test_text_only_split_groups_equal_questions(tmp_path: Path) -> None:
    rows = [row(f"What is {i % 10} + 1?", str(i % 10 + 1)) for i in range(100)]
    (tmp_path / "train.json").write_text(json.dumps(rows))
    folder = prepare(tmp_path, images=None)
    test = {sample["prompt"][0]["content"] for sample in read_samples(folder, "test")}
    train = {sample["prompt"][0]["content"] for sample in read_samples(folder, "train")}
    assert len(test) == 1 and len(train) == 9 and not test & train
    assert read_task(folder)["image_root"] == "."


def test_connect_finds_components() -> None:
    rng = random.Random(0)
    for _ in range(100):
        keys = [[str(rng.randint(0, 12)) for _ in range(rng.randint(1, 3))] for _ in range(8)]
        groups = connect(keys)
        reach = [{i} for i in range(8)]
        for _ in range(8):  # brute force: grow by shared keys
            for i in range(8):
                reach[i] |= {j for j in range(8) for k in reach[i] if set(keys[j]) & set(keys[k])}
        for i in range(8):
            assert groups[i] == min(key for j in reach[i] for key in keys[j])


def test_limit_takes_the_same_subset_for_every_seed_and_order(data: Path) -> None:
    kept = [s["id"] for s in read_samples(prepare(data, test="train.json", limit={"train": 7}), "train")]
    every = [s["id"] for s in read_samples(prepare(data, test="train.json"), "train")]
    assert len(kept) == 7 and kept == [identity for identity in every if identity in set(kept)]
    smaller = [s["id"] for s in read_samples(prepare(data, test="train.json", limit={"train": 3}), "train")]
    assert set(smaller) < set(kept)
    assert [
        s["id"] for s in read_samples(prepare(data, test="train.json", limit={"train": 7}, seed=3), "train")
    ] == kept


def test_second_preparation_is_a_no_op(data: Path) -> None:
    folder = prepare(data)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    times = os.stat(data / "cache" / "data").st_mtime_ns
    assert prepare(data) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    assert os.stat(data / "cache" / "data").st_mtime_ns == times  # nothing was built and thrown away either


def test_touching_an_image_changes_nothing_and_changing_it_does(data: Path) -> None:
    folder = prepare(data)
    os.utime(data / "img" / "3.png")
    assert prepare(data) == folder
    picture(data / "img" / "3.png", 255)
    other = prepare(data)
    assert other != folder and read_task(other)["hash"] != read_task(folder)["hash"]
    picture(data / "img" / "3.png", 30)
    assert prepare(data) == folder


def test_an_unused_image_does_not_matter(data: Path) -> None:
    folder = prepare(data)
    picture(data / "img" / "unused.png", 7)
    assert prepare(data) == folder


def test_hashes_see_what_they_are_of(data: Path) -> None:
    (data / "test.json").write_text(json.dumps([row("How bright?", "3", "3.png")]))
    first = read_task(prepare(data, test="test.json", style="number"))
    rows = json.loads((data / "train.json").read_text())
    (data / "train.json").write_text(json.dumps(rows[:-1]))
    second = read_task(prepare(data, test="test.json", style="number"))
    assert first["hash"] != second["hash"] and first["test_hash"] == second["test_hash"]
    (data / "test.json").write_text(json.dumps([row("How bright?", "4", "3.png")]))
    assert read_task(prepare(data, test="test.json", style="number"))["test_hash"] != first["test_hash"]


def test_a_failed_preparation_leaves_nothing_behind(data: Path) -> None:
    (data / "img" / "3.png").unlink()
    with pytest.raises(InputError):
        prepare(data)
    assert list((data / "cache" / "data").iterdir()) == []
    picture(data / "img" / "3.png", 30)
    assert read_task(prepare(data))["counts"]["train"] == 36


def test_ids_given_or_from_content(tmp_path: Path) -> None:
    rows = [row("q1", "1", id="a"), row("q2", "2", id="b"), row("q3", "3", id="b"), row("q4", "4"), row("q4", "4")]
    (tmp_path / "train.json").write_text(json.dumps(rows))
    ids = [s["id"] for s in read_samples(prepare(tmp_path, images=None, test="train.json", style="number"), "train")]
    assert len(set(ids)) == 5 and ids[4] == f"{ids[3]}-2"
    (tmp_path / "train.json").write_text(json.dumps(rows[:3]))
    (tmp_path / "test.json").write_text(json.dumps([row("q9", "9", id="t")]))
    ids = [s["id"] for s in read_samples(prepare(tmp_path, images=None, test="test.json", style="number"), "train")]
    assert ids[0] == "a" and ids[1] != "b" and ids[2] != "b" and ids[1] != ids[2]
    note = "train: 2 samples have an id that others have too, and get their own"
    assert note in read_task(prepare(tmp_path, images=None, test="test.json", style="number"))["notes"]
    scored = read_task(prepare(tmp_path, images=None, train=None, test="train.json", style="number"))
    assert scored["counts"]["train"] == 0 and note.replace("train", "test") in scored["notes"]
    (tmp_path / "test.json").write_text(json.dumps([row("q9", "9", id="a")]))
    folder = prepare(tmp_path, images=None, test="test.json", style="number")
    assert [read_samples(folder, part)[0]["id"] for part in ("train", "test")] == ["a", "a"]  # two files count apart


def test_format_sentence_goes_to_every_question(tmp_path: Path) -> None:
    dialogue = row("q1", "1")
    dialogue["conversations"] += [{"from": "human", "value": "q2 Be brief."}, {"from": "gpt", "value": "2"}]
    (tmp_path / "train.json").write_text(json.dumps([dialogue]))
    folder = prepare(tmp_path, images=None, test="train.json", style="number", format="Be brief.")
    (sample,) = read_samples(folder, "train")
    assert sample["prompt"][0]["content"] == "q1\nBe brief."
    assert sample["completion"][1]["content"] == "q2 Be brief."  # it had it already


def test_thinking_is_asked_for_where_neither_recipe_nor_data_do(tmp_path: Path) -> None:
    answer = "<think>One and one.</think><answer>2</answer>"
    asking = "q2 Use <think> and <answer> tags."
    (tmp_path / "train.json").write_text(json.dumps([row("q1", answer), row(asking, answer)]))
    wanted = {"images": None, "test": "train.json", "style": "number"}
    for settings, expected in (
        ({"reasoning": "think"}, [f"q1\n{THINK}", asking]),
        ({"reasoning": "think", "format": "Think aloud."}, ["q1\nThink aloud.", f"{asking}\nThink aloud."]),
        ({}, ["q1", asking]),
    ):
        folder = prepare(tmp_path, **wanted, **settings)
        for part in ("train", "test"):
            assert [s["prompt"][0]["content"] for s in read_samples(folder, part)] == expected


def test_of_a_test_dialogue_the_last_answer_is_asked_for(tmp_path: Path) -> None:
    dialogue = row("q1", "1")
    dialogue["conversations"] += [{"from": "human", "value": "q2"}, {"from": "gpt", "value": "2"}]
    (tmp_path / "train.json").write_text(json.dumps([dialogue]))
    folder = prepare(tmp_path, images=None, test="train.json", style="number")
    (train,), (test,) = read_samples(folder, "train"), read_samples(folder, "test")
    assert [m["content"] for m in train["prompt"]] == ["q1"] and len(train["completion"]) == 3
    assert [m["content"] for m in test["prompt"]] == ["q1", "1", "q2"]
    assert test["completion"] == [{"role": "assistant", "content": "2"}] and test["references"] == ["2"]


def test_references_are_without_thinking_and_options_are_found(tmp_path: Path) -> None:
    rows = [row("Which?\nA. red\nB. blue", "<think>It is blue.</think><answer>B</answer>")]
    (tmp_path / "train.json").write_text(json.dumps(rows))
    folder = prepare(tmp_path, images=None, test="train.json", style="mcq", reasoning="think")
    (sample,) = read_samples(folder, "train")
    assert sample["references"] == ["B"] and sample["meta"]["options"] == ["red", "blue"]
    assert sample["reasoning"] == "think" and read_task(folder)["notes"] == ["scorer inferred from the style: mcq"]


def test_answers_without_the_thinking_asked_for_are_noted(tmp_path: Path) -> None:
    (tmp_path / "train.json").write_text(json.dumps([row("q", "7")]))
    folder = prepare(tmp_path, images=None, test="train.json", style="number", reasoning="think")
    assert any("1 answers are not in the form of reasoning 'think'" in note for note in read_task(folder)["notes"])


def test_ten_references_are_scored_as_vqa(tmp_path: Path) -> None:
    (tmp_path / "train.json").write_text(json.dumps([row("q", "cat", answers=["cat"] * 9 + ["dog"])]))
    folder = prepare(tmp_path, images=None, test="train.json", style="short")
    assert read_task(folder)["scorer"] == "vqa_soft" and len(read_samples(folder, "test")[0]["references"]) == 10


READER = """
from PIL import Image

def shapes(part):
    for n in range({"train": 5, "test": 2}.get(part, 0)):
        image = Image.new("RGBA", (8, 8), (n * 20, 0, 0, 255 if n else 0))
        yield {"images": [image], "prompt": f"{part} {n}?", "completion": "7", "meta": {"image_id": f"{part}{n}"}}
"""


def test_reader_with_pil_images(tmp_path: Path) -> None:
    (tmp_path / "pil_reader_one.py").write_text(READER)
    folder = prepare(tmp_path, images=None, train="pil_reader_one:shapes")
    task = read_task(folder)
    assert task["counts"] == {"train": 5, "validation": 0, "test": 2} and task["image_root"] == "."
    sample = read_samples(folder, "train")[0]
    assert sample["meta"]["image_id"] == "train0"
    assert load_image(image_path(folder, task, sample["images"][0])).getpixel((0, 0)) == (255, 255, 255)
    # Images of train and test are equal where n is: stored once, and told.
    assert len(list((folder / "images").iterdir())) == 5
    assert "2 of 2 test samples show an image that train shows too" in task["notes"]
    limited = prepare(tmp_path, images=None, train="pil_reader_one:shapes", limit={"train": 1})
    used = {image for part in ("train", "test") for sample in read_samples(limited, part) for image in sample["images"]}
    assert {f"images/{path.name}" for path in (limited / "images").iterdir()} == used


def test_parquet_bytes_and_paths_end_in_one_folder(data: Path) -> None:
    buffer = io.BytesIO()
    Image.new("CMYK", (6, 6), (0, 255, 255, 0)).save(buffer, "JPEG")
    rows = [
        {"prompt": "q1", "completion": "1", "image": {"bytes": buffer.getvalue(), "path": None}},
        {"prompt": "q2", "completion": "2", "image": {"bytes": None, "path": "5.png"}},
    ]
    pq.write_table(pa.Table.from_pylist(rows), data / "d.parquet")
    folder = prepare(data, train="d.parquet", test="d.parquet", style="number")
    task, samples = read_task(folder), read_samples(folder, "train")
    assert task["image_root"] == "." and len(list((folder / "images").iterdir())) == 2
    red, green, blue = load_image(image_path(folder, task, samples[0]["images"][0])).getpixel((3, 3))
    assert red > 200 and green < 60 and blue < 60
    assert samples[1]["images"][0].endswith(".png")


def test_train_and_test_with_folders_of_their_own(tmp_path: Path) -> None:
    for part, shade in (("a", 10), ("b", 20)):
        picture(tmp_path / part / "x.png", shade)
        (tmp_path / part / "d.json").write_text(json.dumps([row("q", "1", "x.png")]))
    folder = prepare(tmp_path, train="a/d.json", test="b/d.json", images=None, style="number")
    task = read_task(folder)
    for part, shade in (("train", 10), ("test", 20)):
        (sample,) = read_samples(folder, part)
        assert load_image(image_path(folder, task, sample["images"][0])).getpixel((0, 0)) == (shade,) * 3


def test_truncated_jpeg_and_missing_image(data: Path) -> None:
    rows = json.loads((data / "train.json").read_text())
    Image.effect_noise((64, 64), 50).save(data / "img" / "half.jpg")
    whole = (data / "img" / "half.jpg").read_bytes()
    (data / "img" / "half.jpg").write_bytes(whole[: len(whole) // 2])
    (data / "train.json").write_text(json.dumps([*rows, row("q", "1", "half.jpg", id="h1")]))
    with pytest.raises(
        InputError, match=r"sample 41 \(id h1\): image: .*half.jpg: the image cannot be decoded: .*trunc"
    ):
        prepare(data, test="train.json")
    folder = prepare(data, test="train.json", on_bad="drop")
    assert read_task(folder)["counts"]["train"] == 40
    assert any(note.startswith("2 bad samples dropped; the first: ") for note in read_task(folder)["notes"])
    (data / "img" / "half.jpg").write_text("no image")
    with pytest.raises(InputError, match="no image that Pillow knows"):
        prepare(data, test="train.json")
    (data / "img" / "half.jpg").unlink()
    with pytest.raises(InputError, match=r"sample 41 .*no such image: .*half.jpg"):
        prepare(data, test="train.json")
    (data / "img" / "half.jpg").write_bytes(whole)
    assert read_task(prepare(data, test="train.json", on_bad="drop"))["counts"]["train"] == 41  # repaired: seen


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "a/../../x.png", "https://x.org/a.png"])
def test_paths_that_leave_the_image_folder(name: str, data: Path) -> None:
    (data / "train.json").write_text(json.dumps([row("q", "1", name)]))
    with pytest.raises(InputError, match=r"sample 1: image: the image (path .* leaves the image folder|is a URL)"):
        prepare(data)


def test_an_absolute_path_inside_the_image_folder_is_fine(data: Path) -> None:
    (data / "train.json").write_text(json.dumps([row("q", "1", str(data / "img" / "1.png"))]))
    folder = prepare(data, test="train.json", style="number")
    assert read_samples(folder, "train")[0]["images"] == ["1.png"]


@pytest.mark.parametrize(
    ("rows", "fields", "message"),
    [
        ([], {}, r"^t: train\.json: the train part is empty"),
        ([row("q", "1")], {}, "no test set can be split off"),
        ([row("q", "1"), row("r", "2")], {"test": 1.5}, "no share between 0 and 1"),
        ([row("q", "red"), row("r", "2")], {"test": "train.json", "style": "bbox"}, "2 of 2 train answers do not have"),
        ([row("q", "1", "x.png")], {"images": "gone"}, "images: no such folder"),
        ([row("q", "<think>a</think>")], {}, "nothing is left of the answer"),
        ([row("q", "1", meta={"x": float("nan")})], {}, "cannot be written as JSON"),
        ([row("q", "\ud800")], {}, "cannot be written as JSON"),
    ],
)
def test_bad_tasks(rows: list, fields: dict, message: str, tmp_path: Path) -> None:
    (tmp_path / "train.json").write_text(json.dumps(rows))
    with pytest.raises(InputError, match=message) as caught:
        prepare(tmp_path, **{"images": None, **fields})
    assert "\n" not in str(caught.value)


def test_all_samples_bad_says_why(tmp_path: Path) -> None:
    (tmp_path / "train.json").write_text(json.dumps([row("q", "1", "gone.png")]))
    with pytest.raises(InputError, match=r"the train part is empty\. All samples are bad; the first: .*no such image"):
        prepare(tmp_path, images=None, on_bad="drop")


def test_asd_changes_train_alone(data: Path) -> None:
    native, diverse = prepare(data), prepare(data, asd=AsdConfig(fraction=0.5))
    assert prepare(data, asd=AsdConfig(fraction=0.5)) == diverse != native
    assert prepare(data, asd=AsdConfig(fraction=0)) == native
    assert read_task(native)["test_hash"] == read_task(diverse)["test_hash"]
    assert read_samples(native, "test") == read_samples(diverse, "test")
    converted = [sample for sample in read_samples(diverse, "train") if "asd" in sample["meta"]]
    assert len(converted) == 18 == read_json(diverse / "asd_report.json")["converted"]
    assert read_task(diverse)["notes"][-1].startswith("ASD: 18 of 36 samples converted (50.0 %)")
    assert prepare(data, asd=AsdConfig(fraction=0.5), seed=1) != diverse


def test_asd_of_a_task_with_images_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "pil_reader_two.py").write_text(READER)
    diverse = prepare(tmp_path, images=None, train="pil_reader_two:shapes", asd=AsdConfig(fraction=0.4))
    for sample in read_samples(diverse, "train"):
        load_image(image_path(diverse, read_task(diverse), sample["images"][0]))


def test_drop_samples(data: Path) -> None:
    folder = prepare(data, test="train.json")
    ids = [sample["id"] for sample in read_samples(folder, "train")]
    smaller = drop_samples(folder, {"train": set(ids[:2])}, "too long", data / "cache")
    assert [sample["id"] for sample in read_samples(smaller, "train")] == ids[2:]
    assert read_task(smaller)["notes"][-1] == "train: 2 samples dropped, too long"
    with pytest.raises(InputError, match="no sample of the train part is left"):
        drop_samples(folder, {"train": set(ids)}, "too long", data / "cache")
