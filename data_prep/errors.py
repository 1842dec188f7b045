"""The one error a user can cause: bad input, reported in one line, exit code 2."""


class InputError(Exception):
    """Bad input from outside: a file, a field in it, what is wrong, and what to do about it.

    The command line prints `str(error)` on one line and exits with code 2. Raise it as early as possible, before
    anything is written. `where` names the file (and line), `field` the key or sample; either may be empty. The parts
    are kept as attributes, for reports that list many.
    """

    def __init__(self, problem: str, *, where: object = "", field: str = "", remedy: str = ""):
        self.problem, self.where, self.field, self.remedy = problem, str(where), field, remedy
        place = ": ".join(part for part in (self.where, field) if part)
        line = f"{place}: {problem}" if place else problem
        super().__init__(" ".join(f"{line}. {remedy}".split()) if remedy else " ".join(line.split()))
