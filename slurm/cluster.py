"""SLURM's commands: submit, ask, cancel."""

import os
import shutil
import subprocess
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import NamedTuple

from mcit.data_prep.errors import InputError

# A job in any other state can still do something. https://slurm.schedmd.com/squeue.html, "Job state codes"
_ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED"}
_ENDED |= {"BOOT_FAIL", "DEADLINE", "REVOKED"}


class JobState(NamedTuple):
    """What SLURM says of a job."""

    state: str  # COMPLETED, PENDING, …
    reason: str = ""  # why it is pending, or ended as it did

    @property
    def is_active(self) -> bool:
        """Whether it is running, or queued and can still start."""
        return self.state not in _ENDED and self.reason != "DependencyNeverSatisfied"


def need(command: str) -> None:
    """Raise `InputError` unless this machine has a command of SLURM."""
    if shutil.which(command) is None:
        remedy = "Use a machine that submits to a SLURM cluster (`mcit doctor` looks for it)"
        raise InputError("no such command here", where=command, remedy=remedy)


def sbatch(script: Path, options: Iterable[str]) -> str:
    """Submit a job script; returns the job's id. Raises `InputError` with what sbatch says."""
    printed = _call("sbatch", "--parsable", *options, str(script))
    return printed.strip().split(";")[0]  # on a federation: id;cluster


def scancel(ids: Collection[str]) -> None:
    """Cancel jobs; one that has ended is passed over. Raises `InputError`."""
    if ids:
        _call("scancel", *ids)


def states(ids: Collection[str]) -> dict[str, JobState]:
    """The states of jobs, by id; those that SLURM does not remember are missing.

    It forgets a job minutes after its end; from then on only accounting knows, where a cluster keeps it.
    Raises `InputError` where there is no SLURM, or it does not answer.
    """
    if not ids:
        return {}
    ours = f"--user={os.getuid()}"  # asked for by id, a single job that is forgotten would be an error
    rows = _call("squeue", "--noheader", "--array", "--states=all", ours, "--format=%i|%T|%r").splitlines()
    fields = (row.split("|", 2) for row in rows)
    found = {id: JobState(state, "" if reason == "None" else reason) for id, state, reason in fields}
    if unknown := [id for id in ids if id not in found]:
        found |= _accounted(unknown)
    return {id: found[id] for id in ids if id in found}


def _accounted(ids: Collection[str]) -> dict[str, JobState]:
    """What accounting remembers; nothing where there is none."""
    query = ["sacct", "--noheader", "--parsable2", "--allocations", "--format=JobID,State", f"--jobs={','.join(ids)}"]
    try:
        rows = _call(*query).splitlines()
    except InputError:
        return {}
    fields = (row.split("|") for row in rows)
    return {id: JobState(state.split()[0]) for id, state in fields}  # "CANCELLED by 1000"


def _call(*command: str) -> str:
    """What a command of SLURM prints. Raises `InputError` with what it complains of."""
    need(command[0])
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = [line.removeprefix(f"{command[0]}: ").removeprefix("error: ") for line in done.stderr.splitlines()]
        raise InputError("; ".join(filter(None, lines)) or f"exit code {done.returncode}", where=command[0])
    return done.stdout
