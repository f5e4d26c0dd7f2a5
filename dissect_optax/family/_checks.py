"""Errors of the family's own arguments."""

from typing import Any, get_args

from dissect_optax.family._equations import Start


def check_start(start: Any) -> None:
    """Raise unless averages know how to start like this."""
    known = get_args(Start)
    if start not in known:
        raise ValueError(f"`start` must be one of {known}, got {start!r}.")


def require_kept(value: Any, kept: str, name: str) -> Any:
    """What a direction keeps; an error if it keeps none."""
    if value is None:
        raise TypeError(
            f"`{name}` needs a direction that keeps {kept}. Use a direction that has "
            "it in its state, or give `estimate` an average of its own: "
            "estimate(..., mean=moving_average())."
        )
    return value
