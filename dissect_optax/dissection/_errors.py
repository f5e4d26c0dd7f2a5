"""The error that users see, and its sentences."""

import difflib
import textwrap
from collections.abc import Iterable, Mapping

# Some libraries put all they know into their errors.
_LONGEST_LINE = 600


class UserError(ValueError):
    """Something the user can put right; a command line shows it without traceback."""


def unknown_name(
    kind: str, name: str, known: Iterable[str], aliases: Mapping[str, str] | None = None
) -> str:
    """Message for a name that is not known, with the nearest one that is.

    Args:
      kind: What the name is of.
      name: What was given.
      known: All names there are.
      aliases: Other words that may have been meant, each with what to name instead.

    Returns:
      The message.

    Examples:
      >>> print(unknown_name("problem", "digist", ["mnist", "digits"]))
      There is no problem 'digist'. Did you mean 'digits'? Known: mnist, digits.
      >>> print(unknown_name("problem", "xyz", ["mnist", "digits"]))
      There is no problem 'xyz'. Known: mnist, digits.
      >>> print(unknown_name("optimizer", "Adam*", ["svag"], {"ADAM*": "adam_star"}))
      There is no optimizer 'Adam*'. Did you mean 'adam_star'? Known: svag.
    """
    known = list(known)
    meant = {word.lower(): instead for word, instead in (aliases or {}).items()}
    meant |= {word.lower(): word for word in known}
    close = difflib.get_close_matches(name.lower(), meant, n=1)
    question = f" Did you mean '{meant[close[0]]}'?" if close else ""
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
