"""The remote engine against a real vLLM server with the tiny model: the answers of the other engines, by LoRA name."""

import base64
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from PIL import ExifTags, Image
from pydantic import ValidationError
from serving import TINY, base_policy, lora_policy, make_images, make_task
from vllm_server import any_server, free_port

from mcit.data_prep.errors import InputError
from mcit.data_prep.files import read_json, read_jsonl
from mcit.data_prep.images import data_url, load_image
from mcit.eval.config import EvalConfig
from mcit.eval.engines import Policy, Request, generate, make_engine
from mcit.eval.engines.remote import RemoteEngine
from mcit.eval.engines.transformers import TransformersEngine
from mcit.eval.evaluate import evaluate_cells

pytest.importorskip("vllm")
TOKENS = 12
PATTERNS = ("A|B|C", "Yes|No|yes|no", r"-?(?:[0-9]{1,3}(?:,[0-9]{3}){1,4}|[0-9]{1,15})(?:\.[0-9]{1,10})?")


def settings(endpoint: str, **remote: Any) -> EvalConfig:
    known = {"endpoint": endpoint, "concurrency": 8, "retries": 0, "timeout": 120}
    return EvalConfig.model_validate(
        {"engine": "remote", "remote": known | remote, "max_new_tokens": 8, "probes": 2, "constrained": False}
    )


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("remote") / "stages"


@pytest.fixture(scope="module")
def policies(stages: Path) -> list[Policy]:
    """The base, an adapter that the server starts with, and one that it is asked to load."""
    small = {"processor": {"max_pixels": 32 * 32}}
    return [
        base_policy(stages, **small),
        lora_policy(stages, 1, "four", 4, **small),
        lora_policy(stages, 2, "eight", 8, **small),
    ]


@pytest.fixture(scope="module")
def endpoint(stages: Path, policies: list[Policy]) -> Iterator[str]:
    """A slot more than the adapters of these tests: on a CPU vLLM answers for the base with the last slot's adapter."""
    known = f"{policies[1].serving.hash}={policies[1].adapter}"
    arguments = ["--model", str(TINY), "--dtype", "float32", "--max-model-len", "256", "--enforce-eager"]
    arguments += ["--enable-lora", "--max-lora-rank", "8", "--max-loras", "4", "--lora-modules", known]
    arguments += ["--mm-processor-kwargs", json.dumps({"max_pixels": 32 * 32})]
    arguments += ["--structured-outputs-config", json.dumps({"backend": "guidance"})]
    allowed = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"}
    with any_server(stages.parent / "log", arguments, **allowed) as address:
        yield address


@pytest.fixture(scope="module")
def requests(stages: Path, policies: list[Policy]) -> list[Request]:
    """One, two and no images, each question to the base and to two adapters."""
    images = make_images(stages / "images", 4)
    shown = [[images[0]], [images[1]], [images[2], images[3]], [], []]
    return [
        Request([{"role": "user", "content": f"What is number {i}?"}], paths, policy, completion="red circle")
        for i, paths in enumerate(shown)
        for policy in policies
    ]


def test_a_server_says_what_transformers_says_freely_and_held_to_a_form_and_its_log_probs_agree(
    endpoint: str, policies: list[Policy], requests: list[Request]
) -> None:
    slow = TransformersEngine(policies, EvalConfig())
    far = make_engine(policies, settings(endpoint), max_images=2)
    held = [one._replace(pattern=PATTERNS[i % len(PATTERNS)]) for i, one in enumerate(requests)]
    try:
        assert generate(far, [*requests, *held], TOKENS) == generate(slow, [*requests, *held], TOKENS)
        for ours, theirs in zip(far.logprobs(requests), slow.logprobs(requests), strict=True):
            assert ours.prompt_ids == theirs.prompt_ids
            assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-3)

        followed: list[int] = []

        def then(index: int, answer: object) -> Request | None:
            if index >= len(requests):
                return None
            followed.append(index)
            return held[index]

        answers = dict(far.stream(requests, TOKENS, then))
        assert sorted(answers) == list(range(2 * len(requests)))
        assert [answers[len(requests) + followed.index(i)] for i in range(len(held))] == generate(slow, held, TOKENS)
        with pytest.raises(InputError, match=r"eval\.remote: refuses a request \(400: .*256"):
            generate(far, [requests[-1]._replace(prompt=[{"role": "user", "content": "9" * 300}])], 1)
    finally:
        far.close()


def test_cells_are_filled_by_a_server_with_every_adapter_proved(
    endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MCIT_CACHE", str(tmp_path / "cache"))
    run = tmp_path / "run"
    small = {"processor": {"max_pixels": 32 * 32}}
    base_policy(run / "stages", **small)
    lora_policy(run / "stages", 3, "third", 4, **small)
    make_task(run, "seen", 1, 6)
    cells = [(0, "seen"), (3, "seen")]
    evaluate_cells(run, cells, settings(endpoint))
    proof = read_json(run / "stages" / "03-third" / "liveness.json")
    assert proof["ok"] and proof["engine"] == "remote" and proof["gap"] < 1e-3 < proof["effect"]
    assert proof["versions"]["server"] == endpoint
    far = {k: read_jsonl(run / "predictions" / f"{k:02d}" / "seen.jsonl") for k, _ in cells}
    assert read_json(run / "predictions" / "03" / "seen.done.json")["engine"] == "remote"
    near = EvalConfig(engine="transformers", max_new_tokens=8, probes=2, constrained=False)
    evaluate_cells(run, cells, near)
    assert far == {k: read_jsonl(run / "predictions" / f"{k:02d}" / "seen.jsonl") for k, _ in cells}
    (run / "stages" / "03-third" / "liveness.json").unlink()
    for file in (run / "predictions").rglob("*"):
        file.unlink(missing_ok=True) if file.is_file() else None
    monkeypatch.setenv("MCIT_CACHE", str(tmp_path / "another-cache"))
    capsys.readouterr()
    evaluate_cells(run, cells, settings(endpoint, parity=False))
    assert "stage 3 (third): acts (up to" in capsys.readouterr().out
    assert read_json(run / "stages" / "03-third" / "liveness.json")["gap"] is None


def test_an_adapter_that_the_server_cannot_load_is_named_with_the_remedy(endpoint: str, tmp_path: Path) -> None:
    big = lora_policy(tmp_path / "stages", 4, "big", 16)
    remedy = f"--max-lora-rank 16 --lora-modules {big.serving.hash}={big.adapter}"
    with pytest.raises(InputError, match=remedy) as refused:
        RemoteEngine([big], settings(endpoint))
    assert "does not load the adapter of stage 4" in str(refused.value) and "\n" not in str(refused.value)


class Canned(ThreadingHTTPServer):
    """A server that lists a model, answers a number of questions, and then does as `ends` says."""

    def __init__(self, answers: int, ends: int = 503, port: int = 0):
        self.left, self.ends, self.lock = answers, ends, threading.Lock()
        super().__init__(("127.0.0.1", port), Talk)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class Talk(BaseHTTPRequestHandler):
    server: Canned

    def do_GET(self) -> None:
        self._send(200, {"object": "list", "data": [{"id": "tiny", "object": "model"}]})

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.left -= "prompt_logprobs" not in asked
            left = self.server.left
        if left < 0:
            self._send(self.server.ends, {"message": "engine dead"})
            return
        assert asked["temperature"] == 0 and asked["model"] == "tiny"
        message = {"role": "assistant", "content": "yes"}
        usage = {"prompt_tokens": 9, "completion_tokens": 2, "total_tokens": 11}
        choice = {"index": 0, "finish_reason": "stop", "message": message}
        self._send(200, {"id": "x", "object": "chat.completion", "created": 0, "model": "tiny"} | {
            "choices": [choice], "usage": usage
        })  # fmt: skip

    def _send(self, status: int, value: object) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MCIT_CACHE", str(tmp_path / "cache"))
    base_policy(tmp_path / "run" / "stages")
    make_task(tmp_path / "run", "seen", 1, 6)
    return tmp_path / "run"


def test_a_server_that_dies_in_the_middle_costs_nothing_that_was_answered(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It answers four questions; the next one answers what is left."""
    dying = Canned(4)
    config = settings(dying.endpoint, concurrency=1, parity=False)
    with pytest.raises(InputError, match=r"eval\.remote: stopped answering \(503: engine dead\)\. Nothing is lost"):
        evaluate_cells(run, [(0, "seen")], config)
    assert "whether adapters act was NOT shown" in capsys.readouterr().out
    assert len(read_jsonl(run / "predictions" / "00" / "seen.partial.jsonl")) == 1 + 4
    dying.shutdown()
    well = Canned(2)
    evaluate_cells(run, [(0, "seen")], settings(well.endpoint, concurrency=1, parity=False))
    rows = read_jsonl(run / "predictions" / "00" / "seen.jsonl")
    assert [(row["response"], row["tokens"]) for row in rows] == [("yes", 2)] * 6 and well.left == 0
    well.shutdown()


def test_answers_under_way_when_another_fails_are_kept(run: Path) -> None:
    dying = Canned(4)
    with pytest.raises(InputError, match="stopped answering"):
        evaluate_cells(run, [(0, "seen")], settings(dying.endpoint, concurrency=6, parity=False))
    assert len(read_jsonl(run / "predictions" / "00" / "seen.partial.jsonl")) == 1 + 4
    dying.shutdown()


def test_likelihoods_that_a_server_does_not_give_are_an_error_where_they_are_needed(run: Path) -> None:
    well, task = Canned(100), {"name": "seen", "test": "x.json"}
    config = settings(well.endpoint, parity=False).model_dump() | {"general": [task]}
    with pytest.raises(InputError, match=r"eval\.general: .* gives no log-probabilities"):
        evaluate_cells(run, [(0, "seen")], EvalConfig.model_validate(config))
    well.shutdown()


def test_what_the_server_lacks_is_said_in_one_line(run: Path, tmp_path: Path) -> None:
    well = Canned(100)
    with pytest.raises(InputError, match=r"serves no other, but tiny\. Start one with `--model .* other`"):
        evaluate_cells(run, [(0, "seen")], settings(well.endpoint, model="other", parity=False))
    live = lora_policy(tmp_path / "other" / "stages", 1, "live", 4)
    closed = Canned(0, ends=404)
    with pytest.raises(InputError, match=r"does not load the adapter of stage 1 \(404: .*RUNTIME_LORA"):
        RemoteEngine([live], settings(closed.endpoint))
    nobody = settings(f"http://127.0.0.1:{free_port()}/v1")
    with pytest.raises(InputError, match=r"127\.0\.0\.1.*: cannot be used: .*Connection refused"):
        RemoteEngine([live], nobody)
    for server in (well, closed):
        server.shutdown()


def test_an_address_is_checked_before_anything_starts() -> None:
    with pytest.raises(ValidationError, match="needs an address"):
        EvalConfig(engine="remote")
    for address in ("localhost:8000/v1", "http://key@host/v1", "ftp://host"):
        with pytest.raises(ValidationError, match="is an address such as"):
            settings(address)


def test_a_server_sees_pictures_as_we_do(tmp_path: Path) -> None:
    """The file itself where a plain decoder agrees; turned, transparent and foreign pictures as PNG."""
    picture = Image.radial_gradient("L").convert("RGB").crop((0, 0, 200, 120))
    turned, clear = Image.Exif(), picture.convert("RGBA")
    turned[ExifTags.Base.Orientation] = 6
    clear.putalpha(100)
    kept = {"a.jpg": {}, "b.png": {}, "c.jpg": {"exif": turned}, "d.png": {}, "e.bmp": {}}
    for name, options in kept.items():
        (clear if name == "d.png" else picture).save(tmp_path / name, **options)
    for name in kept:
        found = re.fullmatch(r"data:image/(png|jpeg);base64,(.*)", data_url(tmp_path / name))
        assert found
        sent = tmp_path / f"sent.{found[1]}"
        sent.write_bytes(base64.b64decode(found[2]))
        as_it_is = sent.read_bytes() == (tmp_path / name).read_bytes()
        assert as_it_is == (name in ("a.jpg", "b.png"))
        with Image.open(sent) as image:
            assert image.getexif().get(ExifTags.Base.Orientation, 1) == 1
        assert load_image(sent).tobytes() == load_image(tmp_path / name).tobytes()
