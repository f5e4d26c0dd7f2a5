"""The circumstances of a measurement."""

import datetime
import importlib.metadata
import os
import platform

import jax

from experiments.environment import processor

PACKAGES = ("jax", "jaxlib", "optax", "numpy")


def environment() -> dict[str, str | int]:
    """Versions, machine and date, as they belong beside every measured number."""
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "processor": processor(),
        "device": jax.devices()[0].device_kind,
        "cores": os.cpu_count() or 0,
        "threads": len(os.sched_getaffinity(0)),
    }
