"""Paths as a user writes them."""

from pathlib import Path


def expand_home(path: Path) -> Path:
    """The path with `~` replaced, which a shell leaves as it is in `--runs-dir=~/runs`.

    Examples:
      Without such a user it is a name like others.

      >>> expand_home(Path("~nobody-of-this-name/runs")).parts
      ('~nobody-of-this-name', 'runs')
      >>> expand_home(Path("~/runs")) == Path.home() / "runs"
      True
    """
    try:
        return path.expanduser()
    except RuntimeError:
        return path
