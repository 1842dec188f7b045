"""Several vLLM engines as one: a process a GPU, each with all policies, and questions dealt out by image.

Questions on one image stay together, under all policies, so that its caches are as warm as those of one engine.
"""

import contextlib
import multiprocessing
import os
import traceback
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

from mcit.data_prep.errors import InputError
from mcit.eval.config import EvalConfig

from .base import Policy, Request, Response, Scored, Then
from .settings import EngineFailed
from .vllm import VllmEngine

_PATIENCE = 30.0  # seconds for a process to end by itself


class ReplicatedEngine:
    """`VllmEngine`s in processes of their own. They load at the same time."""

    def __init__(self, policies: Sequence[Policy], config: EvalConfig, max_images: int, count: int):
        """Start `count` processes, each of which sees one GPU. Raises what `VllmEngine` does."""
        context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
        self._processes, self._connections = [], list[Connection]()
        try:
            for place in range(count):
                ours, theirs = context.Pipe()
                process = context.Process(target=_work, args=(theirs, policies, config, max_images), daemon=True)
                with _one_gpu(place):
                    process.start()
                theirs.close()
                self._processes.append(process)
                self._connections.append(ours)
            names = [str(value) for _, _, value in self._messages()]
            self.name = names[0]
        except BaseException:
            self.close()
            raise

    def serves(self, policy: Policy) -> bool:
        """See `Engine.serves`."""
        self._send(0, "serves", policy)
        return bool(next(value for _, _, value in self._messages([0])))

    def stream(
        self, requests: Sequence[Request], max_new_tokens: int, then: Then | None = None
    ) -> Iterator[tuple[int, Response]]:
        """See `Engine.stream`. What follows from an answer is asked where that was given."""
        known = _by_place(deal(requests, len(self._processes)), len(self._processes))
        count, whole = len(requests), False
        for place, indices in enumerate(known):
            self._send(place, "stream", [requests[i] for i in indices], max_new_tokens, then is not None)
        try:
            for place, kind, value in self._messages():
                if kind == "done":
                    continue
                number, response = value
                if kind == "answer":
                    yield known[place][number], response
                    continue
                assert then is not None
                request = then(known[place][number], response)
                if request:
                    known[place].append(count)
                    count += 1
                self._connections[place].send(request)
            whole = True
        finally:
            if not whole:  # the processes are in the middle of something
                self.close()

    def logprobs(self, requests: Sequence[Request]) -> list[Scored]:
        """See `Engine.logprobs`."""
        known, results = _by_place(deal(requests, len(self._processes)), len(self._processes)), dict[int, Scored]()
        for place, indices in enumerate(known):
            self._send(place, "logprobs", [requests[i] for i in indices])
        for place, _, scores in self._messages():
            results |= zip(known[place], scores, strict=True)
        return [results[i] for i in range(len(requests))]

    def close(self) -> None:
        """See `Engine.close`."""
        for connection in self._connections:
            connection.close()  # which a process takes as the end
        for process in self._processes:
            process.join(_PATIENCE)
            process.kill()
        self._connections, self._processes = [], []

    def _send(self, place: int, *job: Any) -> None:
        with contextlib.suppress(BrokenPipeError):  # it has died, which is found out when its reply is read
            self._connections[place].send(job)

    def _messages(self, places: Sequence[int] | None = None) -> Iterator[tuple[int, str, Any]]:
        """(process, kind, content) of what the processes say, until each has said that it is done."""
        busy = {self._connections[i]: i for i in (range(len(self._connections)) if places is None else places)}
        while busy:
            for connection in wait([*busy]):
                assert isinstance(connection, Connection)
                place = busy[connection]
                try:
                    kind, content = connection.recv()
                except (EOFError, ConnectionResetError):
                    self._processes[place].join(_PATIENCE)
                    code = self._processes[place].exitcode
                    raise RuntimeError(f"engine process {place} has ended, exit code {code}") from None
                if kind == "failed":
                    raise content
                if kind == "done":
                    del busy[connection]
                yield place, kind, content


def deal(requests: Sequence[Request], count: int) -> list[int]:
    """Which of `count` engines gets each request: all questions on the same images, or without one in the same words,
    go to the same; each in turn, those with the most questions first, to the one that has the fewest so far."""
    groups: dict[Any, list[int]] = {}
    for index, request in enumerate(requests):
        words = tuple(turn["content"] for turn in request.prompt)
        groups.setdefault(tuple(request.images) or words, []).append(index)
    places, loads = [0] * len(requests), [0] * count
    for group in sorted(groups.values(), key=len, reverse=True):
        place = loads.index(min(loads))
        loads[place] += len(group)
        for index in group:
            places[index] = place
    return places


def _by_place(places: Sequence[int], count: int) -> list[list[int]]:
    """The indices that each of `count` engines has, in their order."""
    return [[index for index, place in enumerate(places) if place == wanted] for wanted in range(count)]


@contextlib.contextmanager
def _one_gpu(place: int) -> Iterator[None]:
    """A process started here sees one of the GPUs that this one sees."""
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    os.environ["CUDA_VISIBLE_DEVICES"] = before.split(",")[place] if before else str(place)
    try:
        yield
    finally:
        if before is None:
            del os.environ["CUDA_VISIBLE_DEVICES"]
        else:
            os.environ["CUDA_VISIBLE_DEVICES"] = before


def _work(connection: Connection, policies: Sequence[Policy], config: EvalConfig, max_images: int) -> None:
    """One process: an engine, and what it is told to do until nobody is left to tell it anything."""
    try:
        with contextlib.closing(VllmEngine(policies, config, max_images)) as engine:
            connection.send(("done", engine.name))
            while True:
                _do(engine, connection, *connection.recv())
    except (EOFError, ConnectionError):
        return
    except (InputError, EngineFailed, KeyError) as error:
        failure: Exception = error
    except Exception:
        failure = RuntimeError(traceback.format_exc())
    with contextlib.suppress(OSError):
        connection.send(("failed", failure))


def _do(engine: VllmEngine, connection: Connection, job: str, *given: Any) -> None:
    if job != "stream":
        connection.send(("done", getattr(engine, job)(*given)))
        return
    requests, max_new_tokens, followed = given

    def then(index: int, response: Response) -> Request | None:
        connection.send(("then", (index, response)))
        return connection.recv()

    for answer in engine.stream(requests, max_new_tokens, then if followed else None):
        connection.send(("answer", answer))
    connection.send(("done", None))
