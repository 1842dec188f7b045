"""Rollouts by a real vLLM server, which is sent the adapter of each step through a shared folder."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_rollouts import copy_run, reinforce, trained  # noqa: F401
from training import TINY

from mcit.data_prep.errors import InputError
from mcit.data_prep.files import read_json, read_jsonl

pytest.importorskip("vllm")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = ["--model", str(TINY), "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"]
    arguments += ["--max-model-len", "512", "--enforce-eager", "--logprobs-mode", "processed_logprobs"]
    arguments += ["--enable-lora", "--max-loras", "1", "--max-cpu-loras", "2", "--max-lora-rank", "8"]
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    settings["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "True"
    log, start = tmp_path_factory.mktemp("vllm") / "log", time.monotonic()
    with log.open("w") as file:
        server = subprocess.Popen(
            [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *arguments],
            env=os.environ | settings,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        while not _answers(f"http://127.0.0.1:{port}/v1/models"):
            assert server.poll() is None and time.monotonic() - start < 500, log.read_text()[-3000:]
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(60)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=1) as reply:
            return bool(reply.status == 200)
    except OSError:
        return False


def test_a_server_answers_by_the_adapter_of_each_step(
    trained: tuple[Path, Path],  # noqa: F811
    tmp_path: Path,
    url: str,
) -> None:
    """Images as they are trained on, log-probabilities as the trainer's; nothing is left behind."""
    adapters = tmp_path / "adapters"
    rollout = f"train.rft.rollout={{engine: server, url: '{url}', adapters: '{adapters}'}}"
    for name, k in (("02-again", 2), ("03-words", 3)):
        run = copy_run(trained, tmp_path / name)
        if k == 3:
            (run / "stages" / "02-again").symlink_to(trained[0] / "stages" / "01-colour")
        folder, _ = reinforce(run, trained[1], rollout, "train.rft.args.temperature=0.5", k=k)
        log = [row for row in read_jsonl(folder / "train_log.jsonl") if "reward" in row]
        assert len(log) == 3 and all(row["rollout_gap"] < 1e-3 for row in log)
        assert read_json(folder / "trained.json")["rollouts"]["sent"] == 3
    assert not list(adapters.iterdir())


def test_a_server_that_is_not_there_is_one_clear_line(
    trained: tuple[Path, Path],  # noqa: F811
    tmp_path: Path,
) -> None:
    rollout = f"train.rft.rollout={{engine: server, url: 'http://127.0.0.1:1/v1', adapters: '{tmp_path}'}}"
    with pytest.raises(InputError, match=r"127.0.0.1:1/v1: train.rft.rollout.url: cannot be reached"):
        reinforce(copy_run(trained, tmp_path / "run"), trained[1], rollout)
