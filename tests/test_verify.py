"""`mcit verify`: each kind of problem, planted in small data, is found and named; clean data are clean."""

import io
import json
import os
import struct
import sys
import zlib
from pathlib import Path
from typing import Any

import deadly
import numpy as np
import pytest
from PIL import Image, ImageDraw

import mcit.recipes
from mcit.data_prep import image_files
from mcit.data_prep.errors import InputError
from mcit.data_prep.image_files import ImageFiles, map_images
from mcit.data_prep.prepare import prepare_task, read_samples
from mcit.data_prep.schema import PrepareConfig, TaskConfig
from mcit.data_prep.verify.pictures import Pictures, leads_out, look_at, near
from mcit.data_prep.verify.problems import Problem
from mcit.data_prep.verify.texts import normal
from mcit.pipeline import cli
from mcit.pipeline.data_tools.clean import write_clean
from mcit.pipeline.data_tools.verify import verify
from mcit.pipeline.data_tools.verify_report import make_report

TINY = Path(mcit.recipes.__file__).parent / "mini" / "tiny_vlm"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MCIT_CACHE", str(tmp_path / "cache"))


def scene(seed: int, size: tuple[int, int] = (96, 72)) -> Image.Image:
    """A picture of coloured shapes; another seed is another picture of the same kind."""
    rng = np.random.default_rng(seed)
    image = Image.new("RGB", size, tuple(map(int, rng.integers(150, 255, 3))))
    pen = ImageDraw.Draw(image)
    for _ in range(6):
        x, y, side = int(rng.integers(0, size[0])), int(rng.integers(0, size[1])), int(rng.integers(10, 30))
        pen.ellipse((x - side, y - side, x + side, y + side), fill=tuple(map(int, rng.integers(0, 255, 3))))
    return image


def row(question: str, answer: str, image: str | None = None, **fields: Any) -> dict[str, Any]:
    turns = [
        {"from": "human", "value": f"<image>\n{question}" if image else question},
        {"from": "gpt", "value": answer},
    ]
    return {"conversations": turns, **({"image": image} if image else {}), **fields}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Twelve questions on as many images to train on, four others to test on, and a recipe."""
    (tmp_path / "img").mkdir()
    parts: dict[str, list[dict[str, Any]]] = {"train": [], "test": []}
    for number in range(16):
        scene(number).save(tmp_path / "img" / f"{number}.png")
        parts["test" if number >= 12 else "train"].append(
            row("How many shapes?", str(number % 7), f"{number}.png", id=f"s{number}")
        )
    for part, rows in parts.items():
        (tmp_path / f"{part}.json").write_text(json.dumps(rows))
    recipe(tmp_path, "{name: t, train: train.json, test: test.json, images: img}")
    return tmp_path


def recipe(root: Path, *tasks: str, more: str = "") -> None:
    lines = "".join(f"  - {task}\n" for task in tasks)
    (root / "r.yaml").write_text(f"name: r\nbase_model: {{path: {TINY}, dtype: float32}}\nstream:\n{lines}{more}")


def rows_of(root: Path, name: str = "train.json") -> list[dict[str, Any]]:
    return json.loads((root / name).read_text())


def plant(root: Path, *extra: dict[str, Any], name: str = "train.json") -> None:
    (root / name).write_text(json.dumps([*rows_of(root, name), *extra]))


def problems(root: Path, *data: str, **options: Any) -> list[Problem]:
    with verify([str(root / "r.yaml"), *data], **options) as found:
        return found.findings.problems


def only(root: Path, kind: str, **options: Any) -> Problem:
    (problem,) = problems(root, **options)
    assert problem.kind == kind and "\n" not in problem.line()
    return problem


def test_clean_data_are_clean(data: Path) -> None:
    with verify([str(data / "r.yaml")]) as found:
        report = make_report(found, strict=True)
    assert report["clean"] and report["problems"] == [] and report["leaks"] == []
    train, test = report["parts"]
    assert (train["samples"], train["images"], train["style"], train["scorer"]) == (12, 12, "number", "number")
    assert train["tokens"]["max"] >= train["tokens"]["mean"] > 10 and (test["part"], test["samples"]) == ("test", 4)
    assert list((data / "cache" / "data").iterdir()) == []  # nothing is left of what was read


# --- Rows and files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "kind", "field", "words"),
    [
        (row("q", "1", "gone.png"), "image", "image", "no such image"),
        (row("q", "1", "../train.json"), "image", "image", "leaves the image folder"),
        (row("q", "1", "https://x.org/a.png"), "image", "image", "is a URL"),
        (row("<image> and <image>?", "1", "1.png"), "image", "image", "3 <image> placeholders, but 1 images"),
        (
            row("q", "<image> 1", "1.png"),
            "row",
            "conversations[1]",
            "an <image> placeholder in a turn of the assistant",
        ),
        (row("q", ""), "row", "", "turn 2 (assistant) is empty"),
        (row("q", "1", references=["", " "]), "row", "references", "holds empty answers only"),
        (row("q", "<think>so</think>"), "row", "", "nothing is left of the answer"),
        (row("q", "no " * 3_500_000), "row", "conversations[1]", "10500000 characters in one turn"),
        ({"conversations": [{"from": "robot", "value": "x"}]}, "row", "conversations[0]", "unknown role 'robot'"),
        ({"text": "q"}, "row", "", "no dialogue among the fields"),
        ([1, 2], "row", "", "a sample is an object, not a list"),
        (row("q", "1", video="v.mp4"), "row", "", "videos are not supported"),
    ],
)
def test_a_bad_row_is_named_and_all_others_are_read(bad: Any, kind: str, field: str, words: str, data: Path) -> None:
    plant(data, bad, row("q", "1", "also gone.png", id="last"))
    first, last = problems(data)
    assert (first.kind, first.severity, first.task, first.part, first.field) == (kind, "error", "t", "train", field)
    assert words in first.problem and first.where.startswith(f"{data}/train.json: sample 13")
    assert last.where.endswith("sample 14 (id last)") and "Set `images:`" in last.remedy


def test_a_half_written_list_is_checked_as_far_as_it_goes(data: Path) -> None:
    plant(data, row("q", "1", "gone.png"), row("q", "2"))
    text = (data / "train.json").read_text()
    (data / "train.json").write_text(text[: text.rindex("{")])
    missing, broken = problems(data)
    assert "no such image" in missing.problem
    assert (broken.kind, broken.problem[:14]) == ("file", "malformed JSON") and "half-written" in broken.remedy


def test_every_line_of_json_lines_is_checked(data: Path) -> None:
    lines = [json.dumps(line).encode() for line in rows_of(data)]
    lines[3:3] = [b'{"conversations": [', b'{"id": "caf\xe9"}', b"[1, 2"]
    (data / "train.jsonl").write_bytes(b"\n".join(lines))
    recipe(data, "{name: t, train: train.jsonl, test: test.json, images: img}")
    with verify([str(data / "r.yaml")]) as found:
        wheres = [problem.where.removeprefix(f"{data}/train.jsonl:") for problem in found.findings.problems]
        texts = [problem.problem for problem in found.findings.problems]
        assert found.scans[0].samples["train"] == 12
    assert [where.partition(":")[0] for where in wheres] == ["4", "5", "6"]
    assert texts[1] == "is not UTF-8" and all(text.startswith("malformed JSON") for text in (texts[0], texts[2]))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"PK\x03\x04...", "is an archive"),
        (b"PAR1 no parquet", "unreadable Parquet"),
        (b"[]", "no sample can be read"),
        (b'[{"id": "caf\xe9"}]', "is not UTF-8 (byte 12)"),
        (b"[" * 100_000, "recursion"),
        (None, "no such file"),
    ],
)
def test_a_file_that_cannot_be_read(content: bytes | None, words: str, data: Path) -> None:
    (data / "train.json").unlink()
    if content is not None:
        (data / "train.json").write_bytes(content)
    found = problems(data)
    assert {problem.kind for problem in found} == {"file"} and any(words in problem.problem for problem in found)


# --- Images -----------------------------------------------------------------------------------------------------------


def bomb() -> bytes:
    """A PNG of 30,000 × 30,000 pixels, in a few bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 30_000, 30_000, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def jpeg(image: Image.Image, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"no image", "no image that Pillow knows"),
        (b"", "no image that Pillow knows"),
        (jpeg(scene(1))[:-900], "truncated"),
        (b"PK\x03\x04 an archive with pictures", "is an archive, not an image"),
        (bomb(), "decompression bomb DOS attack. Shrink the file"),
    ],
)
def test_an_image_that_cannot_be_used(content: bytes, words: str, data: Path) -> None:
    (data / "img" / "3.png").write_bytes(content)
    problem = only(data, "image")
    assert words in f"{problem.problem}. {problem.remedy}" and problem.sample == "s3" and problem.remedy
    assert str(data / "img" / "3.png") in problem.problem and problem.where.endswith("sample 4 (id s3)")


@pytest.mark.parametrize(
    ("make", "severity", "words"),
    [
        (lambda: Image.new("CMYK", (64, 64), (0, 255, 255, 0)), "note", "mode CMYK: converted to RGB"),
        (lambda: Image.new("RGBA", (64, 64), (0, 0, 9, 9)), "note", "transparent parts become white"),
        (lambda: Image.fromarray(np.full((64, 64), 4000, np.uint16)), "warning", "values up to 4000: above 255"),
    ],
)
def test_odd_modes_are_noted(make: Any, severity: str, words: str, data: Path) -> None:
    make().save(data / "img" / "3.png", "JPEG" if make().mode == "CMYK" else "PNG")
    problem = only(data, "picture")
    assert problem.severity == severity and words in problem.problem and "3.png" in problem.problem


def test_a_turned_photo_is_noted(data: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    (data / "img" / "3.png").write_bytes(jpeg(scene(3), exif=exif))
    assert "to be turned, which is not done" in only(data, "picture").problem


def test_links_out_of_the_image_folder(data: Path) -> None:
    outside = data / "elsewhere"
    outside.mkdir()
    for number in (3, 4):
        (data / "img" / f"{number}.png").rename(outside / f"{number}.png")
    (data / "img" / "3.png").symlink_to(outside / "3.png")
    (data / "img" / "more").symlink_to("../elsewhere")
    (data / "img" / "same.png").symlink_to("5.png")  # stays inside
    rows = rows_of(data)
    rows[4]["image"], rows[5]["image"] = "more/4.png", "same.png"
    (data / "train.json").write_text(json.dumps(rows))
    file, folder = sorted(problems(data), key=lambda problem: problem.where)
    assert (file.kind, file.severity, file.where) == ("link", "warning", str(data / "img" / "3.png"))
    assert folder.where == str(data / "img" / "more") and "1 images behind it" in folder.problem
    assert leads_out(data / "img" / "same.png", data / "img") is None


def test_a_link_to_nowhere_and_a_pipe_are_no_images(data: Path) -> None:
    (data / "img" / "3.png").unlink()
    (data / "img" / "3.png").symlink_to("gone.png")
    (data / "img" / "4.png").unlink()
    os.mkfifo(data / "img" / "4.png")
    assert ["no such image" in problem.problem for problem in problems(data)] == [True, True]


# --- Answers and lengths ----------------------------------------------------------------------------------------------


def test_answers_without_the_form_of_their_style(data: Path) -> None:
    plant(data, row("Where?", "somewhere on the left", "1.png", id="b1"))
    recipe(data, "{name: t, train: train.json, test: test.json, images: img, style: number}")
    problem = only(data, "form")
    assert (problem.severity, problem.sample, problem.field) == ("warning", "b1", "answer")
    assert "style number: 'somewhere on the left'" in problem.problem
    recipe(data, "{name: t, train: train.json, test: test.json, images: img, style: bbox}")
    found = problems(data)
    assert sum(p.kind == "form" and p.severity == "error" for p in found) == 13  # the preparation refuses such a part
    assert sum(p.kind == "reference" and p.part == "test" for p in found) == 4


def test_gold_answers_of_reinforcement_tuning_need_no_reasoning(data: Path) -> None:
    think = "{name: t, train: train.json, test: test.json, images: img, reasoning: think}"
    recipe(data, think)
    assert {(p.kind, p.part) for p in problems(data)} == {("form", "train")} and len(problems(data)) == 12
    recipe(data, think, more="train: {paradigm: rft}\n")
    assert problems(data) == []


def test_references_that_nothing_can_meet(data: Path) -> None:
    plant(data, row("How many?", "3", "12.png", references=["4"], id="b1"), name="test.json")
    plant(data, row("How many circles?", "3", "13.png", references=["many"], id="b2"), name="test.json")
    first, second = problems(data)
    assert (first.kind, first.severity, first.sample, first.part) == ("reference", "error", "b1", "test")
    assert "the gold answer '3' is wrong_content for the scorer number" in first.problem
    assert "no reference has the form of style number: 'many'" in second.problem


def test_tokens_that_do_not_fit(data: Path) -> None:
    plant(data, row("word " * 300, "1", "1.png", id="long"))
    longest = "train: {max_length: 100}\neval: {max_model_len: 4096}\n"
    recipe(data, "{name: t, train: train.json, test: test.json, images: img}", more=longest)
    problem = only(data, "tokens")
    assert problem.sample == "long" and "tokens, images included, but only 100 fit" in problem.problem


def test_the_models_own_placeholder_and_an_image_it_refuses(data: Path) -> None:
    Image.new("RGB", (3, 900), "red").save(data / "img" / "line.png")
    plant(data, row("What is <|image_pad|>?", "1", id="a"), row("Thin?", "1", "line.png", id="b"))
    found = {problem.sample: problem.problem for problem in problems(data)}
    assert "holds the model's placeholder" in found["a"] and "the processor refuses an image" in found["b"]


def test_a_model_that_cannot_be_had_is_a_note(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with verify([str(data / "r.yaml"), f"base_model.path={data}"]) as found:
        assert found.findings.problems == [] and found.notes[0].startswith("tokens are not counted: ")


# --- Duplicates and leaks ---------------------------------------------------------------------------------------------


def test_duplicates_and_contradictions(data: Path) -> None:
    scene(1).save(data / "img" / "copy.bmp")  # the same pixels in another file
    plant(data, row("how many  SHAPES", "1.", "copy.bmp", id="d"), row("How many shapes?", "5", "2.png", id="c"))
    duplicate, conflict = problems(data)
    assert (duplicate.kind, duplicate.sample, duplicate.severity) == ("duplicate", "d", "warning")
    assert duplicate.problem.endswith("sample 2 (id s1)")
    assert (conflict.kind, conflict.sample) == ("conflict", "c")
    assert conflict.problem.endswith("but the answer '5' instead of '2'")


def test_several_captions_of_an_image_are_no_contradiction(data: Path) -> None:
    recipe(data, "{name: t, train: train.json, test: test.json, images: img, style: caption, scorer: number}")
    plant(data, row("How many shapes?", "a few", "2.png"))
    assert problems(data) == []


@pytest.mark.parametrize(
    ("name", "save", "words"),
    [
        ("leak.png", lambda image, path: image.save(path), "the same image file and the same question"),
        ("leak.bmp", lambda image, path: image.save(path), "the same pixels in another file and the same question"),
        ("leak.jpg", lambda image, path: image.save(path, quality=70), "another version of the image"),
        (
            "leak.jpg",
            lambda image, path: image.resize((192, 144)).save(path, quality=90),
            "another version of the image",
        ),
    ],
)
def test_a_test_image_in_the_training_data(name: str, save: Any, words: str, data: Path) -> None:
    save(scene(13), data / "img" / name)
    plant(data, row("How many shapes?", "6", name, id="leak"))
    with verify([str(data / "r.yaml")]) as found:
        (problem,) = found.findings.problems
        (overlap,) = found.overlaps
    assert (problem.kind, problem.severity, problem.part, problem.sample) == ("leak", "warning", "test", "s13")
    assert problem.problem.startswith(words) and problem.problem.endswith("train.json: sample 13 (id leak)")
    exact = 0 if name == "leak.jpg" else 1
    assert (overlap.leaked, overlap.image, overlap.near, overlap.question) == (1, exact, 1 - exact, 1)


def test_leaks_across_tasks(data: Path) -> None:
    (data / "b.json").write_text(json.dumps([row("What is 2 + 3?", "5"), row("Colour?", "6", "14.png")]))
    (data / "b-test.json").write_text(json.dumps([row("What is 2 - 3?", "1"), row("what is 2 + 3", "5", id="t")]))
    first = "{name: t, train: train.json, test: test.json, images: img}"
    recipe(data, first, "{name: b, train: b.json, test: b-test.json, images: img}")
    with verify([str(data / "r.yaml")]) as found:
        cells = {(o.task, o.part, o.trained): (o.leaked, o.samples, o.question) for o in found.overlaps}
        texts = [problem.problem for problem in found.findings.problems]
    assert cells == {("t", "test", "b"): (1, 4, 0), ("b", "test", "b"): (1, 2, 1)}
    assert any(text.startswith("the same image file in the training data of b") for text in texts)
    assert any(text.startswith("the same question, without an image in the training data of b") for text in texts)


def test_a_test_set_that_is_split_off_is_looked_for_too(data: Path) -> None:
    recipe(data, "{name: t, train: train.json, test: 0.5, images: img}")
    for number in range(8):  # other files of the same pictures: the split may part them
        scene(number).save(data / "img" / f"{number}.jpg", quality=80)
    plant(data, *(row("How many shapes?", str(number % 7), f"{number}.jpg") for number in range(8)))
    with verify([str(data / "r.yaml")]) as found:
        counts, leaks = found.scans[0].samples, [problem.kind for problem in found.findings.problems]
        tested = {record.sample["images"][0] for record in found.scans[0].records() if record.part == "test"}
    assert counts["train"] == counts["test"] == 10 and set(leaks) == {"leak"}
    config = TaskConfig(name="t", train="train.json", test=0.5, images="img")
    folder = prepare_task(config, PrepareConfig(), seed=0, asd=None, base_dir=data, cache=data / "cache")
    assert {image for sample in read_samples(folder, "test") for image in sample["images"]} == tested


def test_versions_of_an_image_are_near_and_other_images_of_its_kind_are_not(tmp_path: Path) -> None:
    pictures = Pictures()

    def add(image: Image.Image, name: str, **options: Any) -> int:
        image.save(tmp_path / name, **options)
        return pictures.number(str(tmp_path / name))

    held = [add(scene(seed), f"{seed}.png") for seed in range(40)]
    others = [add(scene(100 + seed), f"other{seed}.png") for seed in range(200)]
    recoloured = scene(0)
    ImageDraw.Draw(recoloured).rectangle((8, 8, 24, 24), fill="red")  # the same scene, but for what is asked about
    others.append(add(recoloured, "recoloured.png"))
    versions = {}
    for number, seed in zip(held, range(40), strict=True):
        half = scene(seed).resize((48, 36), Image.Resampling.BILINEAR)
        larger = scene(seed).resize((150, 112), Image.Resampling.BICUBIC)
        versions[number] = [
            add(scene(seed), f"{seed}-q80.jpg", quality=80),
            add(half, f"{seed}-half.png"),
            add(larger, f"{seed}-larger.jpg", quality=90),
        ]
    pictures.look(lambda line: None)
    found = near(held, sorted([*others, *(n for numbers in versions.values() for n in numbers)]), pictures)
    pairs = {(number, other) for number, alike in found.items() for other, _ in alike}
    assert pairs == {(number, other) for number, numbers in versions.items() for other in numbers}


def test_what_makes_two_texts_the_same() -> None:
    assert normal("  What is\n it?  ") == normal("WHAT is it") != normal("What is 1+1?")
    assert normal("2 + 3") != normal("2 - 3") and normal("ﬁve") == normal("Five.")


# --- The command ------------------------------------------------------------------------------------------------------


def mcit(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["mcit", "verify", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return int(end.value.code or 0)


def spoil(data: Path) -> None:
    """One of everything."""
    recipe(data, "{name: t, train: train.json, test: test.json, images: img, style: number}")
    scene(13).save(data / "img" / "leak.jpg", quality=90)
    (data / "img" / "3.png").write_bytes(b"no image")
    Image.new("CMYK", (64, 64)).save(data / "img" / "4.png", "JPEG")
    plant(
        data,
        row("q", "1", "gone.png"),
        row("How many shapes?", "6", "leak.jpg", id="leak"),
        row("How many shapes?", "1", "1.png", id="again"),
        row("How many shapes?", "5", "2.png", id="other"),
        row("Where?", "left of it", "5.png", id="formless"),
        row("word " * 40_000, "1", id="long"),
    )
    plant(data, row("How many?", "3", "12.png", references=["4"], id="wrong"), name="test.json")


def test_exit_codes_and_reports(data: Path, monkeypatch, capsys) -> None:
    assert mcit(monkeypatch, data / "r.yaml", "--strict") == 0
    assert "clean" in capsys.readouterr().out
    spoil(data)
    assert mcit(monkeypatch, data / "r.yaml", "--out", data / "report.json") == 2
    out = capsys.readouterr().out
    assert "not clean: 4 problems" in out and "error image: t train: " in out and "warning leak: t test: " in out
    assert mcit(monkeypatch, data / "r.yaml", "--json") == 2
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((data / "report.json").read_text())
    kinds = {"image", "leak", "duplicate", "conflict", "form", "tokens", "reference", "picture"}
    assert {problem["kind"] for problem in printed["problems"]} == kinds
    assert printed["parts"][0]["problems"]["image"] == 2 and printed["leaks"][0]["leaked"] == 1


def test_warnings_count_when_strict(data: Path, monkeypatch) -> None:
    plant(data, row("How many shapes?", "1", "1.png"))
    assert mcit(monkeypatch, data / "r.yaml") == 0
    assert mcit(monkeypatch, data / "r.yaml", "--strict") == 2


@pytest.mark.parametrize("strict", [False, True])
def test_the_clean_copy_is_clean(strict: bool, data: Path, monkeypatch, capsys) -> None:
    spoil(data)
    flags = ["--strict"] if strict else []
    assert mcit(monkeypatch, data / "r.yaml", "--drop-bad", data / "clean", *flags) == 2
    dropped = [json.loads(line) for line in (data / "clean" / "dropped.jsonl").read_text().splitlines()]
    ids = {entry["sample"] for entry in dropped}
    assert ids == {"", "s3", "long", "wrong"} | ({"leak", "again", "other", "s2", "formless"} if strict else set())
    assert all(entry["reasons"] and entry["where"] for entry in dropped)
    kept = [json.loads(line)["id"] for line in (data / "clean" / "t" / "train.jsonl").read_text().splitlines()]
    assert len(kept) == (10 if strict else 15) and not ids & set(kept)
    capsys.readouterr()
    assert mcit(monkeypatch, data / "clean" / "recipe.yaml", "--json", *flags) == 0
    assert json.loads(capsys.readouterr().out)["clean"]


@pytest.mark.parametrize(
    ("broken", "line"),
    [
        (
            lambda data: [(data / "img" / f"{number}.png").unlink() for number in range(12)],
            "t: --drop-bad: nothing is left of the train part",
        ),
        (lambda data: (data / "test.json").write_text("["), "--drop-bad: nothing is left of the test part"),
        (lambda data: (data / "img.zip").write_bytes(b"PK"), "u: --drop-bad: nothing of it can be read"),
    ],
    ids=["no image", "no row", "no archive"],
)
def test_a_copy_without_a_part_is_refused_and_nothing_is_written(broken, line, data: Path, monkeypatch, capsys) -> None:
    task = "train: train.json, test: test.json"
    recipe(data, f"{{name: a, {task}, images: img2}}", f"{{name: t, {task}, images: img}}")
    (data / "img2").mkdir()
    for image in (data / "img").iterdir():
        (data / "img2" / image.name).write_bytes(image.read_bytes())
    if line.startswith("u:"):
        recipe(data, f"{{name: a, {task}, images: img2}}", f"{{name: u, {task}, images: img.zip}}")
    broken(data)
    assert mcit(monkeypatch, data / "r.yaml", "--drop-bad", data / "clean") == 2
    assert line in capsys.readouterr().err and not (data / "clean").exists()


def test_files_without_a_recipe(data: Path, monkeypatch, capsys) -> None:
    scene(13).save(data / "img" / "leak.png")
    plant(data, row("q", "1", "gone.png"), row("How many shapes?", "6", "leak.png"))
    options = ["--images", data / "img", "--test", data / "test.json", "--model", TINY]
    assert mcit(monkeypatch, data / "train.json", *options, "--json", "--drop-bad", data / "clean") == 2
    report = json.loads(capsys.readouterr().out)
    assert [(part["task"], part["part"], part["samples"]) for part in report["parts"]] == [
        ("train", "train", 13),
        ("test", "test", 4),
    ]
    assert {problem["kind"] for problem in report["problems"]} == {"image", "leak"}
    assert all(part["tokens"] for part in report["parts"])
    assert len((data / "clean" / "train.jsonl").read_text().splitlines()) == 13
    assert mcit(monkeypatch, data / "clean" / "train.jsonl", "--images", data / "img") == 0


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["train.json", "seed=1"], "mcit verify: seed=1: changes a recipe, and none is named"),
        (["r.yaml", "--images", "img"], "mcit verify: --images, --model and --max-length are for data files"),
        (["r.yaml", "--drop-bad", "img"], "img: --drop-bad: is not empty. Name a new folder"),
        (["r.yaml", "--drop-bad", "r.yaml"], "r.yaml: --drop-bad: is a file. Name a new folder"),
        (["r.yaml", "--out", "img"], "img: --out: is a folder. Name a file"),
        (["r.yaml", "--out", "r.yaml/report.json"], "r.yaml is a file, not a folder. Name another place"),
        (["r.yaml", "stream.t.scorer=nubmer"], "unknown scorer 'nubmer'. Did you mean number?"),
        ([], "mcit verify: names no recipe and no data file"),
    ],
)
def test_bad_arguments(arguments: list[str], line: str, data: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(data)
    assert mcit(monkeypatch, *arguments) == 2
    assert line in capsys.readouterr().err or not arguments


def test_images_are_the_same_in_processes(data: Path, monkeypatch) -> None:
    (data / "img" / "3.png").write_bytes(b"no image")
    paths = [data / "img" / f"{number}.png" for number in range(16)]
    alone = [str(found) for found in map_images(look_at, paths)]
    monkeypatch.setattr(image_files, "_WORTH_A_PROCESS", 1)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    assert [str(found) for found in map_images(look_at, paths)] == alone
    files = ImageFiles()
    error = files.inspect([files.number(str(path)) for path in paths])[3]
    assert isinstance(error, InputError) and error.where == str(paths[3]) and "Pillow knows" in error.problem


def test_an_image_that_kills_its_process_is_named_and_all_others_are_read(data: Path, monkeypatch) -> None:
    paths = [data / "img" / f"{number}.png" for number in range(16)]
    for at in (3, 9, 10):
        paths[at] = paths[at].rename(paths[at].with_name(f"deadly{at}.png"))
    monkeypatch.setattr(image_files, "_WORTH_A_PROCESS", 1)
    monkeypatch.setattr(image_files, "_AT_ONCE", 8)
    monkeypatch.setattr(image_files, "_CHUNK", 2)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    found = list(map_images(deadly.look, paths))
    errors = {at: fact for at, fact in enumerate(found) if isinstance(fact, InputError)}
    assert list(errors) == [3, 9, 10]
    assert str(errors[9]).startswith(f"{paths[9]}: the image cannot be decoded: it kills the process that tries to")
    assert [fact for at, fact in enumerate(found) if at not in errors] == [
        deadly.look(path) for at, path in enumerate(paths) if at not in errors
    ]


def test_images_inside_a_file_are_written_beside_the_clean_copy(data: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"prompt": "q", "completion": str(n), "image": {"bytes": jpeg(scene(n)), "path": None}} for n in range(3)]
    rows.append({"prompt": "q", "completion": "3", "image": {"bytes": jpeg(scene(3))[:-900], "path": None}})
    pq.write_table(pa.Table.from_pylist(rows), data / "d.parquet")
    with verify([str(data / "d.parquet")]) as found:
        assert [problem.kind for problem in found.findings.problems] == ["image"]
        write_clean(found, False, data / "clean")
    assert len(list((data / "clean" / "images").iterdir())) == 3
    with verify([str(data / "clean" / "d.jsonl")]) as found:
        assert found.findings.problems == [] and found.scans[0].samples["train"] == 3


def test_a_report_does_not_depend_on_the_run(data: Path) -> None:
    spoil(data)
    reports = []
    for _ in range(2):
        with verify([str(data / "r.yaml")]) as found:
            reports.append(make_report(found, strict=False))
    assert reports[0] == reports[1]
