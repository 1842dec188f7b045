"""The one error a user can cause: bad input, reported in one line, exit code 2."""


class InputError(Exception):
    """Bad input from outside: a file, a field in it, what is wrong, and what to do about it.

    The command line prints `str(error)` on one line and exits with code 2. Raise it as early as possible, before
    anything is written. `where` names the file (and line), `field` the key or sample; either may be empty.
    """

    def __init__(self, problem: str, *, where: object = "", field: str = "", remedy: str = ""):
        place = ": ".join(part for part in (str(where), field) if part)
        line = f"{place}: {problem}" if place else problem
        super().__init__(" ".join(f"{line}. {remedy}".split()) if remedy else " ".join(line.split()))
