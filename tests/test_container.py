"""The container recipe agrees with what it installs. It is not built here."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCKERFILE = (ROOT / "docker" / "Dockerfile").read_text()
INSTRUCTIONS = {"ARG", "FROM", "RUN", "WORKDIR", "COPY", "ENV", "CMD"}


def test_cuda_is_that_of_the_constraints() -> None:
    pinned = re.search(r"^nvidia-cuda-runtime==(\d+\.\d+)", (ROOT / "constraints-gpu.txt").read_text(), re.MULTILINE)
    image = re.search(r"^ARG CUDA=(\d+\.\d+)\.\d+$", DOCKERFILE, re.MULTILINE)
    assert pinned and image and image[1] == pinned[1]


def test_every_line_is_an_instruction() -> None:
    logical = re.sub(r"\\\n", " ", DOCKERFILE)
    lines = [line for line in logical.splitlines() if line.strip() and not line.startswith("#")]
    assert {line.split()[0] for line in lines} == INSTRUCTIONS


def test_what_make_needs_is_in_the_image() -> None:
    """`.dockerignore` leaves out what the installation makes, and nothing that it reads."""
    ignored = (ROOT / ".dockerignore").read_text().split()
    needed = [
        "Makefile",
        "pyproject.toml",
        "README.md",
        "constraints-gpu.txt",
        "overrides-gpu.txt",
        "pipeline",
        "recipes",
    ]
    assert not set(ignored) & set(needed) and all((ROOT / name).exists() for name in needed)
    assert "make install VARIANT=gpu" in DOCKERFILE and "constraints-gpu.txt" in (ROOT / "Makefile").read_text()
