"""Secrets: what looks like one, and the values of those that this process was given."""

import os
import re
from collections.abc import Iterator

_SHAPES = {
    "a token of the Hub": r"hf_[A-Za-z0-9]{30,}",
    "an API key": r"sk-[A-Za-z0-9_-]{20,}|AIza[A-Za-z0-9_-]{35}|xox[abprs]-[A-Za-z0-9-]{10,}",
    "a token of GitHub": r"gh[pousr]_[A-Za-z0-9]{30,}|github_pat_[A-Za-z0-9_]{30,}",
    "an access key of AWS": r"AKIA[A-Z0-9]{16}",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
}
_SHAPE = re.compile("|".join(rf"(?P<s{i}>(?<![A-Za-z0-9]){shape})" for i, shape in enumerate(_SHAPES.values())))
_VARIABLE = re.compile(r"(^|_)(TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?|(API|ACCESS|SECRET|PRIVATE)_?KEY)(_|$)")
_SHORTEST = 8  # characters: shorter values are settings, and would be found everywhere
REDACTED = "[redacted]"


def shaped_secrets(text: str) -> Iterator[tuple[str, int]]:
    """(what it is, where it starts) of each part of a text that looks like a secret; it itself is not said."""
    kinds = list(_SHAPES)
    for match in _SHAPE.finditer(text):
        assert match.lastgroup
        yield kinds[int(match.lastgroup[1:])], match.start()


def secrets_in(text: str) -> Iterator[tuple[str, int]]:
    """The same, and the values of secrets that this process was given."""
    yield from shaped_secrets(text)
    for variable, value in _given():
        if (start := text.find(value)) >= 0:
            yield f"the value of {variable}", start


def redact(text: str) -> str:
    """A text without the secrets in it."""
    for _, value in _given():
        text = text.replace(value, REDACTED)
    return _SHAPE.sub(REDACTED, text)


def _given() -> Iterator[tuple[str, str]]:
    """Variables of the environment that hold secrets, and the token that `hf auth login` has left."""
    for variable, value in os.environ.items():
        if len(value) >= _SHORTEST and _VARIABLE.search(variable.upper()):
            yield variable, value
    from huggingface_hub import get_token

    if token := get_token():
        yield "the Hub's login", token
