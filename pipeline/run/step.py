"""What a step of a run is, and how training is launched."""

import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mcit.data_prep.errors import InputError
from mcit.data_prep.files import hash_json, read_json, read_text

from ..recipe.layers import RECIPES, nearest
from ..recipe.text import parse_yaml
from .doctor import cores, gpu_gib

Facts = dict[str, Any]
FORK = "fork"  # the name of the launch that is in none of accelerate's files
Show = Callable[[str], None]


@dataclass(frozen=True)
class Launch:
    """How training is started; no part of any fingerprint."""

    config: Path  # of `accelerate launch`
    processes: int  # on all nodes together
    nodes: int = 1  # of a SLURM job step, in which each starts its share
    mode: str = "single"  # how processes share a model out: single, ddp, zero2, zero3, or what accelerate calls it
    forks: bool = False  # stages and evaluation are forked from processes that have imported what they need

    @classmethod
    def named(cls, name: str, gpus: int | None = None, nodes: int = 1) -> "Launch":
        """`single`, `ddp`, `zero2`, … (recipes/accelerate/), `fork`, or the path of an accelerate configuration.

        `fork` is `single` without the start of a process for each stage. `gpus` is the number of processes on each
        node. Raises `InputError`.
        """
        if name == FORK:
            if gpu_gib() is not None:
                problem = "is for machines without a GPU, which a process forks before it can be sure not to use"
                raise InputError(problem, where=f"--launch {name}", remedy="Add --launch single")
            return replace(cls.named("single", gpus, nodes), forks=True)
        known = {file.stem: file for file in (RECIPES / "accelerate").glob("*.yaml")}
        path = known.get(name, Path(name))
        if not path.is_file():
            raise InputError(
                "no such launch configuration", where=f"--launch {name}", remedy=nearest(name, [*known, FORK])
            )
        config = parse_yaml(read_text(path), str(path))
        if not isinstance(config, dict):
            raise InputError("is not an accelerate configuration", where=path)
        machines = config.get("num_machines") or 1
        if machines > 1 and nodes == 1:
            remedy = "Take ddp, `mcit submit --nodes`, or accelerate itself on each machine, as the file says"
            raise InputError(f"is for {machines} machines, and this is one", where=path, remedy=remedy)
        processes = (gpus or (config.get("num_processes") or 1) // machines) * nodes
        if processes > 1 and config.get("distributed_type") == "NO":
            remedy = "Add --launch ddp or --launch zero2"
            raise InputError(f"starts one process, not {processes}", where=path, remedy=remedy)
        return cls(path, processes, nodes, _mode(config, processes))

    @property
    def rank(self) -> int:
        """Which of the nodes this is."""
        return int(_told("SLURM_NODEID", self.nodes)) if self.nodes > 1 else 0

    def command(self, *script: Path | str) -> list[str]:
        """The command line that runs a script with arguments."""
        launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(self.config)]
        launcher += ["--num_processes", str(self.processes)]
        if "OMP_NUM_THREADS" not in os.environ:  # else accelerate gives each process one thread
            launcher += ["--num_cpu_threads_per_process", str(max(1, cores() * self.nodes // self.processes))]
        if self.nodes > 1:
            launcher += ["--num_machines", str(self.nodes), "--machine_rank", str(self.rank)]
            launcher += ["--main_process_ip", _told("MASTER_ADDR", self.nodes)]
            launcher += ["--main_process_port", _told("MASTER_PORT", self.nodes)]
            launcher += ["--deepspeed_multinode_launcher", "standard"]  # as without DeepSpeed; else it would use ssh
        return [*launcher, *map(str, script)]


def _mode(config: dict[str, Any], processes: int) -> str:
    """What `Method.distributed` calls an accelerate configuration."""
    kind = str(config.get("distributed_type", "NO"))
    if kind == "DEEPSPEED":
        return f"zero{max((config.get('deepspeed_config') or {}).get('zero_stage', 2), 2)}"
    if kind in ("NO", "MULTI_GPU", "MULTI_CPU"):
        return "ddp" if processes > 1 else "single"
    return kind


def _told(variable: str, nodes: int) -> str:
    """What a job's script or `srun` tells the processes of a step on several nodes. Raises `InputError`."""
    if variable not in os.environ:
        remedy = "`mcit submit` writes job scripts that set it"
        raise InputError(f"{variable} is not set, and {nodes} nodes need it to meet", where="--nodes", remedy=remedy)
    return os.environ[variable]


@dataclass(frozen=True)
class Step:
    """One step of a run."""

    name: str  # e.g. train/2
    title: str  # for people
    marker: Path
    there: Callable[[], bool]  # whether what the step makes exists
    inputs: Callable[[], Facts | None]  # what it depends on; None as long as a step before it is not done
    work: Callable[[Show, int], Facts]  # gets (show a line of progress, the lock's descriptor), returns marker facts
    again: bool = False  # the work itself sees whether anything changed: it is always done, and kept if facts agree
    extras: tuple[str, ...] = ()  # inputs that only add something: no reason to redo what has it once it is not wanted

    @property
    def file_name(self) -> str:
        """The name as part of a file name."""
        return self.name.replace("/", "-")

    def done(self) -> Facts | None:
        """The marker, if it belongs to the inputs as they are now."""
        marker, inputs = self._compared()
        current = marker is not None and inputs is not None and marker["fingerprint"] == hash_json(inputs)
        return marker if current and self.there() else None

    def changed(self) -> list[str]:
        """The dotted keys in which the inputs differ from those that the step was done with before."""
        marker, inputs = self._compared()
        if marker is None or inputs is None:
            return []
        before, now = dict(_flatten(marker["inputs"])), dict(_flatten(inputs))
        return sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))

    def _compared(self) -> tuple[Facts | None, Facts | None]:
        """The marker, and the inputs with what was added before, if that is not wanted any more."""
        marker = self._marker()
        inputs = self.inputs() if marker is not None else None  # they can be dear: the hash of a base model
        if marker is None or inputs is None:
            return marker, inputs
        return marker, {key: marker["inputs"][key] for key in self.extras if key in marker["inputs"]} | inputs

    def _marker(self) -> Facts | None:
        return read_json(self.marker) if self.marker.exists() else None


def _flatten(value: Any, at: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested mappings by dotted key."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _flatten(inner, f"{at}.{key}" if at else str(key))
    else:
        yield at, value
