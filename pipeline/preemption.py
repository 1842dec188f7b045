"""Being asked to stop: by SLURM before a time limit or for another job, or by anybody's `kill`."""

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

EXIT_CODE = 75  # of a command that stopped because it was asked to, and goes on when it is called again
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Preempted(BaseException):
    """The process was asked to stop. No `Exception`, so that nobody takes it for an error of what was at work."""


@contextlib.contextmanager
def preemptible() -> Iterator[None]:
    """Raise `Preempted` in the block at the first SIGTERM or SIGUSR1; later ones leave the stopping alone."""

    def stop(number: int, frame: FrameType | None) -> None:
        for each in _SIGNALS:
            signal.signal(each, signal.SIG_IGN)
        raise Preempted(f"stopped by {signal.Signals(number).name}; the same command goes on from here")

    before = {number: signal.signal(number, stop) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def deaf_children() -> Iterator[None]:
    """Processes that are started in the block do not receive SIGUSR1, and nor do their own.

    SLURM sends a signal to every process of a job step, and most would die of this one. Only the process that started
    them is to hear it, and then stops them in good order.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
