"""Readers: every layout into the same raw sample, and one clear line for everything malformed."""

import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mcit.data_prep.errors import InputError
from mcit.data_prep.readers import is_function, load_function, read_rows, source_identity
from mcit.data_prep.rows import RawSample, parse_row
from mcit.data_prep.schema import TaskConfig


def read(path: Path) -> list[RawSample]:
    return [parse_row(row, where) for where, row in read_rows(path.name, "train", path.parent)]


def write(path: Path, content: object) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def llava(*turns: str, **fields: object) -> dict:
    return {
        "conversations": [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(turns)],
        **fields,
    }


def texts(messages: list) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in messages]


def test_llava_json_single_turn(tmp_path: Path) -> None:
    path = write(tmp_path / "d.json", [llava("<image>\nWhat is it?", " A cat ", id=7, image="a/b.jpg")])
    (raw,) = read(path)
    assert (raw.id, raw.images, raw.references, raw.moved) == ("7", ["a/b.jpg"], None, False)
    assert texts(raw.prompt) == [("user", "What is it?")] and texts(raw.completion) == [("assistant", "A cat")]


def test_llava_json_multi_turn_teaches_every_answer(tmp_path: Path) -> None:
    path = write(tmp_path / "d.json", [llava("q1", "a1", "q2", "a2")])
    (raw,) = read(path)
    assert raw.images == [] and texts(raw.prompt) == [("user", "q1")]
    assert texts(raw.completion) == [("assistant", "a1"), ("user", "q2"), ("assistant", "a2")]


def test_sharegpt_with_system_and_several_images(tmp_path: Path) -> None:
    row = llava("<image><image>Which is larger?", "The first", images=["1.png", "2.png"])
    row["conversations"].insert(0, {"from": "system", "value": "Be short."})
    (raw,) = read(write(tmp_path / "d.json", [row]))
    assert raw.images == ["1.png", "2.png"]
    assert texts(raw.prompt) == [("system", "Be short."), ("user", "Which is larger?")]
    row["system"] = row["conversations"].pop(0)["value"]  # as LLaMA-Factory has it
    (beside,) = read(write(tmp_path / "d.json", [row]))
    assert texts(beside.prompt) == texts(raw.prompt)


def test_a_reader_that_fails_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "my_failing_reader.py").write_text("def rows(part):\n    yield {}\n    raise KeyError('answer')\n")
    with pytest.raises(InputError, match=r"rows: sample 2 of train: the reader failed: KeyError: 'answer'"):
        list(read_rows("my_failing_reader:rows", "train", tmp_path))
    (tmp_path / "my_broken_reader.py").write_text("def rows(part)\n")
    with pytest.raises(InputError, match=r"cannot import my_broken_reader \(SyntaxError"):
        list(read_rows("my_broken_reader:rows", "train", tmp_path))


@pytest.mark.parametrize(
    ("text", "images", "expected", "moved"),
    [
        ("<image>\nWhat?", 1, "What?", False),
        ("What?\n<image>", 1, "What?", False),
        ("What? <image>", 1, "What?", False),
        ("<image>\n<image>\nWhat?", 2, "What?", False),
        ("Compare <image> with <image>.", 2, "Compare image 1 with image 2.", True),
        ("What is in <image>", 1, "What is in image 1", True),
        ("What?", 2, "What?", False),  # no placeholders: the images come first
    ],
)
def test_image_placeholders(text: str, images: int, expected: str, moved: bool) -> None:
    raw = parse_row(llava(text, "a", images=["x.png"] * images), "here")
    assert (raw.prompt[0]["content"], raw.moved) == (expected, moved)


def test_image_in_a_later_turn_is_moved_to_the_front() -> None:
    raw = parse_row(llava("q1", "a1", "<image>q2", "a2", image="x.png"), "here")
    assert raw.moved and texts(raw.completion)[1] == ("user", "q2") and raw.images == ["x.png"]


def test_trl_messages_with_typed_parts_and_extra_columns(tmp_path: Path) -> None:
    row = {
        "id": "s1",
        "messages": [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "How many?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "3"}]},
        ],
        "images": ["x.png"],
        "references": ["3", "three"],
        "style": "number",
        "reasoning": "none",
        "meta": {"source": "mine"},
    }
    (raw,) = read(write(tmp_path / "d.jsonl", json.dumps(row) + "\n\n"))
    assert raw.references == ["3", "three"] and raw.style == "number" and raw.meta == {"source": "mine"}
    assert parse_row(llava("q", "a", meta={"options": [1, 2.5]}), "here").meta == {"options": ["1", "2.5"]}
    assert texts(raw.prompt) == [("user", "How many?")] and raw.images == ["x.png"]


def test_trl_typed_parts_may_hold_the_image_path() -> None:
    row = {
        "prompt": [{"role": "user", "content": [{"type": "text", "text": "Q?"}, {"type": "image", "image": "x.png"}]}],
        "completion": [{"role": "assistant", "content": "a"}],
    }
    assert parse_row(row, "here").images == ["x.png"]


def test_trl_prompt_completion_strings_and_prompt_with_history() -> None:
    raw = parse_row({"prompt": "2+2?", "completion": "4"}, "here")
    assert texts(raw.prompt) == [("user", "2+2?")] and texts(raw.completion) == [("assistant", "4")]
    history = [{"role": role, "content": role} for role in ("user", "assistant", "user")]
    raw = parse_row({"prompt": history, "completion": "x"}, "here")
    assert len(raw.prompt) == 3  # what the author put into the prompt is not taught
    raw = parse_row({"prompt": "2+2?", "answers": [{"answer": "4"}, {"answer": "four"}]}, "here")
    assert raw.references == ["4", "four"] and texts(raw.completion) == [("assistant", "4")]


def test_parquet_with_embedded_and_path_images(tmp_path: Path) -> None:
    rows = [
        {"prompt": "Q?", "completion": "a", "image": {"bytes": b"xyz", "path": None}},
        {"prompt": "Q?", "completion": "b", "image": {"bytes": None, "path": "x.png"}},
        {"prompt": "Q?", "completion": "c", "image": None},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "data.bin")  # told by its content, not by its name
    assert [raw.images for raw in read(tmp_path / "data.bin")] == [[b"xyz"], ["x.png"], []]


def test_parquet_typed_parts_with_null_fields(tmp_path: Path) -> None:
    parts = [{"type": "image", "text": None}, {"type": "text", "text": "Q?"}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": [{"type": "text", "text": "a"}]}]
    pq.write_table(pa.Table.from_pylist([{"messages": messages, "images": ["x.png"]}]), tmp_path / "d.parquet")
    (raw,) = read(tmp_path / "d.parquet")
    assert raw.prompt[0]["content"] == "Q?" and raw.completion[0]["content"] == "a"


def test_content_decides_not_the_name(tmp_path: Path) -> None:
    assert len(read(write(tmp_path / "list.jsonl", [llava("q", "a")]))) == 1
    assert len(read(write(tmp_path / "lines.json", "\n".join(json.dumps(llava("q", "a")) for _ in "ab")))) == 2
    assert len(read(write(tmp_path / "bom.json", "\ufeff" + json.dumps([llava("q", "a")])))) == 1
    assert len(read(write(tmp_path / "bom.jsonl", "\ufeff" + json.dumps(llava("q", "a"))))) == 1


def test_a_line_separator_inside_a_string_ends_no_line(tmp_path: Path) -> None:
    text = json.dumps(llava("q\u2028r", "a\x85b"), ensure_ascii=False)
    (raw,) = read(write(tmp_path / "d.jsonl", text))
    assert raw.prompt[0]["content"] == "q\u2028r"


def test_reader_function(tmp_path: Path) -> None:
    module = tmp_path / "my_reader_one.py"
    module.write_text("def rows(part):\n    yield {'prompt': part, 'completion': 'x'}\n")
    assert is_function("my_reader_one:rows") and not is_function("data/train.json") and not is_function("C:/x.json")
    (where, row), *_ = list(read_rows("my_reader_one:rows", "test", tmp_path))
    assert row["prompt"] == "test" and where == "my_reader_one:rows: sample 1"
    before = source_identity("my_reader_one:rows", tmp_path)
    module.write_text(module.read_text() + "# changed\n")
    assert source_identity("my_reader_one:rows", tmp_path) != before


@pytest.mark.parametrize(
    ("spec", "message"),
    [("no_such_module_x:f", "cannot import no_such_module_x"), ("json:no_such", "module json has no function no_such")],
)
def test_bad_reader_function(spec: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        load_function(spec, tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "d.json: is empty"),
        (b" \n ", "d.json: is empty"),
        (b'[{"conversations": [{"from": "hu', r"d.json:1:\d+: malformed JSON.*half-written"),
        (b'{"prompt": "q", "completion": "a"}\n{"prompt": "q", "compl', r"d.json:2:\d+: malformed JSON"),
        (b'{\n "data": []\n}', r"d.json:1:\d+: malformed JSON.*JSON list"),
        (b'[{"prompt": "caf\xe9", "completion": "a"}]', "is not UTF-8"),
        (b'{"prompt": "q", "completion": "a"}\n{"prompt": "caf\xe9"}', "d.json:2: is not UTF-8"),
        (b"PK\x03\x04abc", "is an archive"),
        (b"PAR1abcdef", "unreadable Parquet"),
        (b"hello", "malformed JSON"),
    ],
)
def test_bad_files(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "d.json").write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        read(tmp_path / "d.json")
    assert "\n" not in str(caught.value)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"gone.json: no such file"):
        read(tmp_path / "gone.json")
    with pytest.raises(InputError, match="is a directory"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([1], "a sample is an object, not a list"),
        ({"text": "q", "label": 1}, r"no dialogue among the fields \['label', 'text'\].*conversations"),
        (llava("q", "a", video="x.mp4"), "videos are not supported yet"),
        (llava("<video>\nq", "a"), "videos are not supported yet"),
        (llava("<image>q", "a"), "1 <image> placeholders, but 0 images"),
        (llava("<image><image>q", "a", image="x.png"), "2 <image> placeholders, but 1 images"),
        (llava("q", "<image> a", image="x.png"), r"conversations\[1\]: an <image> placeholder in a turn of the assis"),
        (llava("q"), "conversations: has no assistant turn"),
        (llava("q", "a", "q2"), "last turn is a question without an answer"),
        (llava("q", ""), r"turn 2 \(assistant\) is empty"),
        (llava("", "a"), r"turn 1 \(user\) is empty"),
        ({"conversations": [{"from": "gpt", "value": "a"}]}, "do not alternate"),
        ({"conversations": [{"from": "robot", "value": "a"}]}, r"conversations\[0\]: unknown role 'robot'"),
        ({"conversations": [{"from": "human", "value": None}]}, r"conversations\[0\]: has no text"),
        (llava("q", 7), r"conversations\[1\]: is 7, not a text\. Write it as a text"),
        ({"prompt": "q", "completion": 7.5}, r"completion\[0\]: is 7\.5, not a text\. Write it as a text"),
        ({"prompt": "q", "completion": {"role": "assistant", "content": "a"}}, "completion: is not a list of turns"),
        ({"conversations": "hello"}, "conversations: is not a list of turns"),
        ({"conversations": ["hello"]}, r"conversations\[0\]: is not an object"),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "unknown content part"),
        (llava("q", "a", image=3), "image: '3' is no path and no image"),
        (llava("q", "a", style="essay"), r"style: unknown value 'essay'.*Use one of short"),
        (llava("q", "a", reasoning="deep"), "reasoning: unknown value 'deep'"),
        (llava("q", "a", references=[{"x": 1}]), "references: is not a list of strings"),
        (llava("q", "a", references=[""]), "references: holds empty answers only"),
        (llava("q", "a", meta="x"), "meta: is not an object"),
        (llava("q", "a", meta={"options": 5}), r"meta\.options: is not a list of texts"),
        (llava("q", "a", meta={"options": ["a", ["b"]]}), r"meta\.options: is not a list of texts"),
        (llava("q", "a", meta={"image_id": [3]}), r"meta\.image_id: is neither a text nor a number"),
        ({"prompt": "q"}, "completion: no answer"),
    ],
)
def test_bad_rows_name_place_field_and_remedy(row: object, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        parse_row(row, "d.json: sample 3")
    assert str(caught.value).startswith("d.json: sample 3") and "\n" not in str(caught.value)
    assert caught.value.remedy


def test_errors_name_the_sample_id() -> None:
    with pytest.raises(InputError, match=r"^d.json: sample 3 \(id x7\): "):
        parse_row(llava("q", id="x7"), "d.json: sample 3")


def test_the_rows_that_the_docs_show_are_read() -> None:
    shown = Path(__file__).parents[1].joinpath("docs/data.md").read_text().split("## Your own data")[1]
    rows = [json.loads(row) for row in shown.split("```json\n")[1].split("```")[0].splitlines()]
    samples = [parse_row(row, "docs/data.md") for row in rows]
    assert [len(sample.images) for sample in samples] == [1, 2, 0, 1, 1, 1]
    assert [len(sample.completion) for sample in samples] == [1, 3, 1, 1, 1, 1]
    assert [sample.completion[0]["content"] for sample in samples].count("12.50") == 4
    keys = re.findall(r"^\| (`.*?) \|", shown.split("| key |")[1].split("\n\n")[0], re.MULTILINE)
    assert set(re.findall(r"`(\w+)`", " ".join(keys))) == TaskConfig.model_fields.keys() - {"name"}
