"""Asking a model over HTTP: every answer asked for once and kept, every failure one clear line."""

import base64
import itertools
import json
import re
import socketserver
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from canned import Canned, Reply, completion, failure, good, keys_of, serve, words_of
from PIL import Image

from mcit.data_prep.endpoint import Endpoint, Picture, Prompt, Question
from mcit.data_prep.errors import InputError
from mcit.data_prep.files import hash_files
from mcit.data_prep.schema import EndpointConfig

SCHEMA = {"type": "object", "properties": {"wrong_1": {"type": "string"}}, "required": ["wrong_1"]}
Ask = Callable[..., list[Any]]


@pytest.fixture
def server() -> Iterator[Canned]:
    with serve() as server:
        yield server


def questions(count: int, images: tuple[Picture, ...] = ()) -> list[Question]:
    return [Question(Prompt("Be good.", f"Question: {i}?\nCorrect answer: red", SCHEMA), images) for i in range(count)]


def endpoint(server: Canned | str, cache: Path, show: Callable[[str], None] = print, **settings: Any) -> Endpoint:
    address = server if isinstance(server, str) else server.address
    known = {"endpoint": address, "model": "m", "concurrency": 4, "retries": 1, "timeout": 60}
    return Endpoint(EndpointConfig.model_validate(known | settings), cache / "kept", 1, show)


def refusal(server: Canned | str, cache: Path, count: int = 5, **settings: Any) -> str:
    with pytest.raises(InputError) as caught:
        endpoint(server, cache, **settings).ask(questions(count))
    line = str(caught.value)
    assert "\n" not in line and (server if isinstance(server, str) else server.address) in line
    return line


def test_what_is_sent(server: Canned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images as data URLs of the files' bytes, what the model cannot read as PNG, the schema, and the key."""
    photo, drawing = tmp_path / "a.jpg", tmp_path / "b.bmp"
    Image.new("RGB", (8, 8), "red").save(photo)
    Image.new("RGB", (8, 8), "blue").save(drawing)
    monkeypatch.setenv("MY_KEY", "secret-1")
    asking = endpoint(server, tmp_path, api_key_env="MY_KEY", request={"temperature": None, "top_k": 3})
    asking.ask(questions(1, (Picture(photo, "1"), Picture(drawing, "2"))))
    [body] = server.asked
    first, second, text = body["messages"][1]["content"]
    assert body["messages"][0] == {"role": "system", "content": "Be good."} and text["text"].startswith("Question: 0?")
    kind, data = first["image_url"]["url"].split(";base64,")
    assert kind == "data:image/jpeg" and base64.b64decode(data) == photo.read_bytes()
    assert second["image_url"]["url"].startswith("data:image/png;base64,")
    assert body["response_format"]["json_schema"]["schema"] == SCHEMA and body["model"] == "m"
    assert body["top_k"] == 3 and body["max_completion_tokens"] == 512 and "temperature" not in body
    assert server.keys == {"Bearer secret-1"}
    assert not any(b"secret-1" in file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())


def test_each_question_is_asked_once_ever(server: Canned, tmp_path: Path) -> None:
    first = endpoint(server, tmp_path).ask([*questions(6), *questions(6)])
    assert len(server.asked) == 6 and first[:6] == first[6:]
    assert endpoint("http://127.0.0.1:9/v1", tmp_path).ask(questions(6)) == first[:6]  # wherever the model is served
    endpoint(server, tmp_path).ask(questions(8))
    assert len(server.asked) == 8
    picture = (Picture(tmp_path / "x.png", "1"),)
    Image.new("RGB", (4, 4)).save(picture[0].path)
    for changed in ({"model": "other"}, {"request": {"temperature": 1}}):
        endpoint(server, tmp_path, **changed).ask(questions(1))
    endpoint(server, tmp_path).ask(questions(1, picture))
    endpoint(server, tmp_path).ask(questions(1, (Picture(picture[0].path, "2"),)))
    assert len(server.asked) == 12


def test_no_more_questions_at_once_than_allowed(tmp_path: Path) -> None:
    lock, now, most = threading.Lock(), [0], [0]

    def slow(body: dict[str, Any]) -> Reply:
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        time.sleep(0.05)
        with lock:
            now[0] -= 1
        return good(body)

    lines: list[str] = []
    with serve(slow) as server:
        endpoint(server, tmp_path, lines.append, concurrency=5).ask(questions(20))
    assert 1 < most[0] <= 5
    assert lines[-1].startswith("20 of 20 answers, ")


def test_too_many_requests_and_faults_that_pass_are_waited_out(tmp_path: Path) -> None:
    """Each question meets a 429 and a 500 before its answer: the client's own retries."""
    seen: dict[str, int] = {}

    def moody(body: dict[str, Any]) -> Reply:
        seen[words_of(body)] = count = seen.get(words_of(body), 0) + 1
        return (failure(429, "slow down"), failure(500))[count - 1] if count < 3 else good(body)

    with serve(moody) as server:
        answers = endpoint(server, tmp_path, retries=2).ask(questions(5))
    assert len(answers) == 5 and set(seen.values()) == {3}


def test_what_failed_for_the_time_being_is_asked_again_at_the_end(tmp_path: Path) -> None:
    with serve() as server:
        server.answer = lambda body: (
            failure(503) if "Question: 0?" in words_of(body) and len(server.asked) < 5 else good(body)
        )
        answers = endpoint(server, tmp_path, retries=0, concurrency=1).ask(questions(6))
    assert len(answers) == 6 and len(server.asked) == 7


@pytest.mark.parametrize(
    ("reply", "line"),
    [
        (failure(429, "Rate limit reached"), r"429: Rate limit reached\. Nothing is lost: run it again"),
        (failure(500, "out of memory"), r"500: out of memory\. Nothing is lost"),
        (failure(401, "bad key"), r"401: bad key\. The environment variable NO_KEY is not set: put the API key there"),
        (failure(403, "no access"), r"403: no access\. The environment variable"),
        (failure(404, "The model `m` does not exist."), r"has no model m \(404: The .*\)\. Served: m, other\. Check"),
        (failure(400, "response_format is not known"), r"400: response_format is not known\. It took no question yet"),
        (Reply(200, "{not json"), "answers something that is no chat completion. Nothing is lost"),
        (Reply(200, "<html>", {"content-type": "text/html"}), "answers something that is no chat completion"),
        (Reply(200, '{"choices": []}'), "answers something that is no chat completion"),
        (Reply(200, "[1, 2]"), "answers something that is no chat completion"),
    ],
)
def test_an_endpoint_that_cannot_be_used_is_one_line(tmp_path: Path, reply: Reply, line: str) -> None:

    with serve(lambda body: reply) as server:
        assert re.search(line, refusal(server, tmp_path, api_key_env="NO_KEY"))
        assert len(server.asked) <= 5 * 2


def test_a_key_that_is_refused_is_told_from_one_that_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", "sk-secret-3")
    with serve(lambda body: failure(401, "no such key: sk-secret-3")) as server:
        line = refusal(server, tmp_path, api_key_env="MY_KEY")
    assert "401: no such key: …. The environment variable MY_KEY is not accepted" in line


def test_nobody_there(tmp_path: Path) -> None:
    """Found out by two calls, however often a question would be repeated."""
    calls: list[object] = []

    class HangUp(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            calls.append(self.client_address)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), HangUp) as nobody:
        threading.Thread(target=nobody.serve_forever, daemon=True).start()
        line = refusal(f"http://127.0.0.1:{nobody.server_address[1]}/v1", tmp_path, retries=6)
        nobody.shutdown()
    assert "cannot be reached" in line and "vllm serve" in line and len(calls) == 2


def test_timeouts_for_ever(tmp_path: Path) -> None:
    release = threading.Event()

    def hang(body: dict[str, Any]) -> Reply:
        release.wait(20)
        return good(body)

    with serve(hang) as server:
        try:
            line = refusal(server, tmp_path, timeout=0.2, retries=1)
        finally:
            release.set()
    assert "timed out" in line and "Nothing is lost" in line


def test_an_endpoint_that_does_not_list_its_models_can_be_used(server: Canned, tmp_path: Path) -> None:
    server.models = []
    assert len(endpoint(server, tmp_path).ask(questions(2))) == 2


def test_a_question_that_the_endpoint_does_not_take_is_an_answer(tmp_path: Path) -> None:
    """As when one image is too large: the others are answered, it is not, and nothing of it is kept."""

    def picky(body: dict[str, Any]) -> Reply:
        return failure(400, "too long") if "Question: 3?" in words_of(body) else good(body)

    with serve(picky) as server:
        answers = endpoint(server, tmp_path).ask(questions(6))
        assert [answer["refused"] for answer in answers] == ["", "", "", "400: too long", "", ""]
        assert endpoint(server, tmp_path).ask(questions(6)) == answers and len(server.asked) == 7


def test_after_a_breakdown_only_the_rest_is_asked(tmp_path: Path) -> None:
    with serve() as server:
        numbers = itertools.count(1)
        server.answer = lambda body: good(body) if next(numbers) <= 7 else failure(500)
        assert "500" in refusal(server, tmp_path, 20, retries=0)
        kept = len(list((tmp_path / "kept").rglob("*.json")))
        assert kept == 7
        server.answer, before = good, len(server.asked)
        assert len(endpoint(server, tmp_path).ask(questions(20))) == 20
        assert len(server.asked) - before == 13
    with serve() as whole:
        endpoint(whole, tmp_path / "whole").ask(questions(20))
    folders = [tmp_path / "kept", tmp_path / "whole" / "kept"]
    assert len({hash_files(folder.rglob("*.json"), folder) for folder in folders}) == 1


def test_a_refusal_in_its_own_field_and_a_cut_off_answer(tmp_path: Path) -> None:
    replies = iter([completion(None, refusal="I will not."), completion('{"wr', "length")])
    with serve(lambda body: next(replies)) as server:
        answers = endpoint(server, tmp_path, concurrency=1).ask(questions(2))
    assert [answer["finish_reason"] for answer in answers] == ["refusal", "length"]
    assert json.dumps(keys_of(server.asked[0])) == '["wrong_1"]'
