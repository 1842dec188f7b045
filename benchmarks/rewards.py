"""A reward for steps of which only the time matters."""

import random
from typing import Any


def noise(response: str, references: list[str], sample: Any) -> float:
    """A reward that differs, whatever the answer."""
    return random.random()
