"""A real HTTP server that speaks the chat-completions protocol and says what a test wants it to say."""

import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

COLOURS = ["red", "green", "blue", "yellow", "black", "white", "purple", "orange"]


class Reply(NamedTuple):
    """An HTTP reply; `body` is sent as it is."""

    status: int
    body: str
    headers: dict[str, str] = {"content-type": "application/json"}  # noqa: RUF012


def completion(content: str | None, finish_reason: str = "stop", refusal: str | None = None) -> Reply:
    """A chat completion with one choice."""
    message = {"role": "assistant", "content": content, "refusal": refusal}
    choice = {"index": 0, "finish_reason": finish_reason, "message": message}
    usage = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
    body = {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice], "usage": usage}
    return Reply(200, json.dumps(body))


def failure(status: int, message: str = "it went wrong", **headers: str) -> Reply:
    """An error in OpenAI's form; the client is told to try again at once."""
    known = {"content-type": "application/json", "retry-after-ms": "1"}
    body = json.dumps({"error": {"message": message, "type": "error", "code": None}})
    return Reply(status, body, known | {key.replace("_", "-"): value for key, value in headers.items()})


def words_of(body: dict[str, Any]) -> str:
    """The text of a request's user turn."""
    return next(part["text"] for part in body["messages"][-1]["content"] if part["type"] == "text")


def keys_of(body: dict[str, Any]) -> list[str]:
    """The keys that a request's schema asks for."""
    return body["response_format"]["json_schema"]["schema"]["required"]


def good(body: dict[str, Any]) -> Reply:
    """What a good model would reply: other colours, or an explanation that says the answer."""
    text = words_of(body)
    answer = re.findall(r"^Correct answer: (.*)$", text, re.MULTILINE)[-1]
    if keys_of(body) != ["explanation"]:
        wrong = [colour for colour in COLOURS if colour != answer]
        return completion(json.dumps(dict(zip(keys_of(body), wrong, strict=False))))
    reason = "which one can tell from the bright surface that faces us in the middle of the picture"
    sentence = f"It is {answer}, {reason}, right beside the door."
    if "50 words" in text:
        sentence += " " + " ".join(["The light falls on it from the left side, and nothing covers any part of it."] * 2)
    return completion(json.dumps({"explanation": sentence}))


class Canned(ThreadingHTTPServer):
    """The server. `answer` makes the reply to a chat request; `asked` are the requests that came, `keys` their keys."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, answer: Callable[[dict[str, Any]], Reply]):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answer, self.asked, self.keys, self.models = answer, list[dict[str, Any]](), set[str](), ["m", "other"]

    @property
    def address(self) -> str:
        """What a recipe's `endpoint` would be."""
        return f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away (a timeout, an interrupt) is what some tests are about."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Canned

    def do_GET(self) -> None:
        listed = {"object": "list", "data": [{"id": name, "object": "model"} for name in self.server.models]}
        self._send(Reply(200, json.dumps(listed)) if self.server.models else failure(404))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.asked.append(body)
        self.server.keys.add(self.headers["authorization"])
        self._send(self.server.answer(body))

    def _send(self, reply: Reply) -> None:
        data = reply.body.encode()
        self.send_response(reply.status)
        for name, value in reply.headers.items():
            self.send_header(name, value)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        """Quiet."""


@contextmanager
def serve(answer: Callable[[dict[str, Any]], Reply] = good) -> Iterator[Canned]:
    """The server, running until the block ends."""
    with Canned(answer) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
