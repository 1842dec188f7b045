"""How lines differ from each other in the figures."""

# Okabe & Ito's colours, told apart by colour-blind people; from the ninth line on, other strokes tell them apart.
_COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999"]
_STROKES = ["-", "--", ":", "-."]
COLUMNS = len(_COLOURS)  # of a legend


def stroke(number: int) -> dict[str, str]:
    """Colour and stroke of the line with this number, counted from 0."""
    strokes = number // len(_COLOURS) % len(_STROKES)
    return {"color": _COLOURS[number % len(_COLOURS)], "linestyle": _STROKES[strokes]}
