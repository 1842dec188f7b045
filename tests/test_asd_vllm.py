"""ASD by a model end to end: the embedded tiny VLM behind a real vLLM server, with guided JSON.

The tiny model cannot write. What it says is valid or a counted fallback all the same, and the share comes from what
rules supply.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from vllm_server import vllm_server

from mcit.data_prep.errors import InputError
from mcit.data_prep.files import read_json, read_jsonl
from mcit.data_prep.schema import AsdConfig
from mcit.pipeline.data_tools.convert import convert_file

pytest.importorskip("vllm")


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with vllm_server(tmp_path_factory.mktemp("vllm") / "log") as address:
        yield address


def write_data(folder: Path, count: int) -> Path:
    """Colours, which the model is asked about, and numbers, whose wrong answers rules find."""
    rows = []
    for i in range(count):
        Image.new("RGB", (32, 32), (255 * (i % 2), i, 0)).save(folder / f"{i}.png")
        question, answer = [("What colour is it?", ("black", "red")[i % 2]), ("How many dots?", str(i % 9))][i // 2 % 2]
        turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
        rows.append({"id": f"s{i}", "image": f"{i}.png", "conversations": turns})
    (folder / "train.json").write_text(json.dumps(rows))
    return folder / "train.json"


def settings(endpoint: str, **changed: Any) -> AsdConfig:
    request = {"temperature": 0, "max_completion_tokens": 96}
    known = {"fraction": 0.4, "converter": "llm", "endpoint": endpoint, "model": "tiny", "request": request}
    return AsdConfig.model_validate(known | changed)


def test_valid_or_a_counted_fallback_whatever_the_model_says(
    endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MCIT_CACHE", str(tmp_path / "cache"))
    source = write_data(tmp_path, 60)
    with pytest.raises(InputError, match=r"has no model big \(404: .*\)\. Served: tiny\."):
        convert_file(source, tmp_path / "out.jsonl", settings(endpoint, model="big"), 0, None, print)
    report = convert_file(source, tmp_path / "out.jsonl", settings(endpoint), 0, None, print)
    print(json.dumps({key: value for key, value in report.items() if key != "examples"}))

    replies = [read_json(file) for file in (tmp_path / "cache" / "asd").rglob("*.json")]
    assert all(reply["prompt_tokens"] > 100 and reply["completion_tokens"] for reply in replies)
    finished = [json.loads(reply["content"]) for reply in replies if reply["finish_reason"] == "stop"]
    assert finished and all(set(reply) <= {"wrong_1", "wrong_2", "wrong_3", "explanation"} for reply in finished)

    rows = read_jsonl(tmp_path / "out.jsonl")
    new = [row for row in rows if "asd" in row["meta"]]
    fell_back = sum(sum(found["fell_back"].values()) for found in report["styles"].values())
    assert len(rows) == 60 and len(new) == report["converted"] == 24  # numbers by rule make up for what fell back
    assert report["validation"] == {"checked": 24, "failed": {}} and fell_back > 0
    assert report["usage"]["questions"] >= len(replies) and report["yes_no"] and report["letters"]

    before = (tmp_path / "out.jsonl").read_bytes()  # the same again, without the server
    convert_file(source, tmp_path / "out.jsonl", settings("http://127.0.0.1:9/v1"), 0, None, print)
    assert (tmp_path / "out.jsonl").read_bytes() == before
