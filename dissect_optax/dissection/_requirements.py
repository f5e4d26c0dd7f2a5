"""The packages of the extra `dissect`, asked for before anything that imports them."""

import importlib.util

_PACKAGES = ("filelock", "jinja2", "matplotlib", "orbax.checkpoint", "rich", "scipy")


def _is_installed(package: str) -> bool:
    """Whether a package is there; it is not imported."""
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # Of `orbax`, which holds `orbax.checkpoint`.
        return False


def check_packages() -> None:
    """Raises unless all packages of the extra are installed.

    Raises:
      ModuleNotFoundError: One is missing.
    """
    missing = [package for package in _PACKAGES if not _is_installed(package)]
    if missing:
        raise ModuleNotFoundError(
            "`dissect_optax.dissect` and the command `dissect-optax` need"
            f" {', '.join(missing)}, which come with an extra: pip install"
            " 'dissect-optax[dissect]'",
            name=missing[0],
        )


check_packages()
