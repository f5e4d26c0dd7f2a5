"""What to say when something is not as it should be."""

import difflib
import textwrap
from collections.abc import Iterable

# Some libraries put all they know into their errors.
_LONGEST_LINE = 600


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


def first_line(error: BaseException) -> str:
    r"""What an error says, as one sentence that is not too long.

    Examples:
      >>> first_line(ValueError("The file is too short: \nline 1\nline 2"))
      'The file is too short.'
      >>> first_line(KeyError())
      'unreadable (KeyError).'
    """
    text = str(error).strip() or f"unreadable ({type(error).__name__})"
    line = textwrap.shorten(text.splitlines()[0], _LONGEST_LINE, placeholder=" …")
    return line.rstrip(" .:") + "."
