"""A decoder that kills its process, as a function that other processes find."""

import os
import signal
from pathlib import Path

from mcit.data_prep.errors import InputError
from mcit.data_prep.images import ImageFacts, inspect_image


def look(path: Path) -> ImageFacts | InputError:
    """Decode an image, unless its name says that this is deadly."""
    if path.name.startswith("deadly"):
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        return inspect_image(path)
    except InputError as error:
        return error
