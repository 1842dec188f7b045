"""A dataset on a Hub of our own: what `snapshot_download` asks the real one, answered from a folder."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def serve(dataset: str, folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Serve `folder` as `dataset`; yields the endpoint and the list of files that were sent."""
    sent: list[str] = []

    def files() -> list[dict[str, object]]:
        found = sorted(file for file in folder.rglob("*") if file.is_file())
        return [
            {"type": "file", "path": file.relative_to(folder).as_posix(), "size": file.stat().st_size, "oid": "0" * 40}
            for file in found
        ]

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = unquote(self.path.partition("?")[0])
            if path.startswith(f"/api/datasets/{dataset}"):
                found = files() if "/tree/" in path else {"id": dataset, "sha": COMMIT}
                return self._send(json.dumps(found).encode(), {"Content-Type": "application/json"})
            name = path.removeprefix(f"/datasets/{dataset}/resolve/{COMMIT}/")
            if name == path or not (folder / name).is_file():
                return self._send(b"", {"X-Error-Code": "RepoNotFound"}, 404)
            data = (folder / name).read_bytes()
            if self.command == "GET":
                sent.append(name)
            self._send(data, {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": COMMIT})

        def _send(self, data: bytes, headers: dict[str, str], status: int = 200) -> None:
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(data))}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(data)

        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", sent
    finally:
        server.shutdown()
        server.server_close()
