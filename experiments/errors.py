"""What to say when something is not as it should be."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Something the user can put right; the command line shows it without traceback."""


def unknown_name(kind: str, name: str, known: Iterable[str]) -> str:
    """Message for a name that is not known, with the nearest one that is.

    Examples:
      >>> print(unknown_name("problem", "digist", ["mnist", "digits"]))
      There is no problem 'digist'. Did you mean 'digits'? Known: mnist, digits.
      >>> print(unknown_name("problem", "xyz", ["mnist", "digits"]))
      There is no problem 'xyz'. Known: mnist, digits.
    """
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1)
    question = f" Did you mean '{close[0]}'?" if close else ""
    return f"There is no {kind} '{name}'.{question} Known: {', '.join(known)}."
