"""How two answers are made comparable."""

import re
import unicodedata

# Signs that look alike, and those that Unicode's compatibility form (NFKC) would merge with digits: 10² is not 102.
_LOOKALIKES = str.maketrans(
    {"’": "'", "‘": "'", "“": '"', "”": '"', "–": "-", "—": "-", "−": "-", "‑": "-"}
    | {sign: f"^{digit}" for digit, sign in enumerate("⁰¹²³⁴⁵⁶⁷⁸⁹")}
    | {"½": " 1/2", "¼": " 1/4", "¾": " 3/4"}
)
_OPENING = " \t\r\n\"'`«([{*_"
_CLOSING = " \t\r\n\"'`»)]}*_.,;:!?"
_ARTICLE = re.compile(r"^(?:a|an|the)\s+(?=\S)")


def plain(text: str) -> str:
    """Lower case, one kind of space, quote and dash, no quotes, brackets or closing punctuation around, no article.

    Never empty unless `text` is blank: what consists of punctuation alone is kept. Signs and units are content
    ("-5", "$5", "5%" and ".5" stay as they are).
    """
    text = " ".join(unicodedata.normalize("NFKC", text.translate(_LOOKALIKES)).casefold().split())
    bare = text.lstrip(_OPENING).rstrip(_CLOSING)
    return _ARTICLE.sub("", bare) or text
