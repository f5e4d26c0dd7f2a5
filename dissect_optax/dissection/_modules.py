"""Modules of the user's, by name."""

import importlib
import os
import sys
from types import ModuleType


def import_module(name: str) -> ModuleType:
    """The module of this name, also from the current directory.

    A console script, unlike `python -m`, does not look there.

    Raises:
      ModuleNotFoundError: There is none.
      Exception: Whatever the module raises.
    """
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(here)
