"""Real vLLM servers, as users start them."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import mcit.recipes

TINY = Path(mcit.recipes.__file__).parent / "mini" / "tiny_vlm"
STRUCTURED = {"backend": "xgrammar", "disable_any_whitespace": True}  # else a weak model emits blanks until cut off


@contextlib.contextmanager
def vllm_server(log: Path, adapters: Mapping[str, Path] | None = None) -> Iterator[str]:
    """The address of a server of `tiny`, with guided JSON, and of LoRAs on it by name, until the block ends."""
    arguments = ["--model", str(TINY), "--served-model-name", "tiny", "--dtype", "float32", "--max-model-len", "1024"]
    arguments += ["--enforce-eager", "--structured-outputs-config", json.dumps(STRUCTURED)]
    if adapters:
        arguments += ["--enable-lora", "--max-lora-rank", "16", "--lora-modules"]
        arguments += [f"{name}={folder}" for name, folder in adapters.items()]
    with any_server(log, arguments) as address:
        yield address


@contextlib.contextmanager
def any_server(log: Path, arguments: Sequence[str], **env: str) -> Iterator[str]:
    """The address, up to /v1, of a server that is started with `arguments`; its output goes to `log`."""
    port = free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1", "--port", str(port)]
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"} | env
    start = time.monotonic()
    with log.open("w") as file:
        server = subprocess.Popen(
            [*command, *arguments],
            env=os.environ | settings,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        while not _answers(f"http://127.0.0.1:{port}/v1/models"):
            assert server.poll() is None and time.monotonic() - start < 900, log.read_text()[-3000:]
            time.sleep(1)
        print(f"vLLM served after {time.monotonic() - start:.0f} s")
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGTERM)
        server.wait(60)


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=1) as reply:
            return reply.status == 200
    except OSError:
        return False
