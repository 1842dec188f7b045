"""`mcit asd` of a file: what it refuses before any work, and what it says of what was left out."""

import json
from pathlib import Path

import pytest
from canned import serve
from test_asd_llm import write_data

from mcit.data_prep.errors import InputError
from mcit.data_prep.files import read_jsonl
from mcit.data_prep.schema import AsdConfig
from mcit.pipeline.data_tools.convert import convert_file


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MCIT_CACHE", str(tmp_path / "cache"))
    write_data(tmp_path, 10)
    return tmp_path


def test_a_place_that_cannot_be_written_is_refused_before_a_model_is_asked(data: Path) -> None:
    source, before = data / "train.json", (data / "train.json").read_bytes()
    with serve() as server:
        asd = AsdConfig(fraction=0.5, converter="llm", endpoint=server.address, model="m")
        for target, problem in (
            (source, "is the file to convert"),
            (data / "img", "is a folder"),
            (source / "out.jsonl", "is a file, not a folder"),
        ):
            with pytest.raises(InputError, match=rf"{target}: OUT: .*{problem}"):
                convert_file(source, target, asd, 0, data / "img", print)
        assert server.asked == []
    assert source.read_bytes() == before


def test_what_is_left_out_is_counted_in_the_report(data: Path) -> None:
    rows = json.loads((data / "train.json").read_text())
    (data / "train.json").write_text(json.dumps([*rows, {**rows[0], "id": "bad", "image": "../0.png"}]))
    arguments = (data / "train.json", data / "out.jsonl", AsdConfig(fraction=0.5), 0, data / "img", print)
    with pytest.raises(InputError, match="leaves the image folder"):
        convert_file(*arguments)
    report = convert_file(*arguments, on_bad="drop")
    assert report["samples"] == len(read_jsonl(data / "out.jsonl")) == 10
    assert any(note.startswith("1 bad samples dropped; the first: ") for note in report["notes"])
