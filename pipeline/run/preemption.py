"""Being asked to stop: by SLURM before a time limit or for another job, or by anybody's `kill`."""

import contextlib
import signal
from collections.abc import Callable, Iterator
from types import FrameType

EXIT_CODE = 75  # of a command that stopped because it was asked to, and goes on when it is called again
PATIENCE = 90  # seconds that a child has to stop in; SLURM gives 120 before a time limit (`--signal` of a job)
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Preempted(BaseException):
    """The process was asked to stop. No `Exception`, so that nobody takes it for an error of what was at work."""


@contextlib.contextmanager
def preemptible() -> Iterator[None]:
    """Raise `Preempted` in the block at the first SIGTERM or SIGUSR1; later ones leave the stopping alone."""

    def stop(number: int, frame: FrameType | None) -> None:
        for each in SIGNALS:
            signal.signal(each, signal.SIG_IGN)
        raise Preempted(f"stopped by {signal.Signals(number).name}; the same command goes on from here")

    with _handled(stop):
        yield


@contextlib.contextmanager
def deferred() -> Iterator[Callable[[], bool]]:
    """Yield a function that tells whether SIGTERM or SIGUSR1 has come in the block, which goes on all the same."""
    came = list[int]()
    with _handled(lambda number, frame: came.append(number)):
        yield lambda: bool(came)


@contextlib.contextmanager
def deaf_children(*signals: signal.Signals) -> Iterator[None]:
    """Processes that are started in the block do not receive `signals`, and nor do their own, until they ask for them.

    SLURM sends a signal to every process of a job step, and most would die of it. Only those that know how to stop in
    good order are to hear it: `preemptible` asks for both.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def _handled(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Both signals go to `handler` in the block, even where the parent had made this process deaf."""
    before = {number: signal.signal(number, handler) for number in SIGNALS}
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)
