"""The circumstances of a measurement, and JAX's names that differ between versions."""

import contextlib
import datetime
import importlib
import importlib.metadata
import os
import platform

import jax

from dissect_optax.dissection import processor

PACKAGES = ("jax", "jaxlib", "optax", "numpy")


def enable_x64(enabled: bool) -> contextlib.AbstractContextManager[None]:
    """`jax.enable_x64`, also for JAX before 0.8."""
    if hasattr(jax, "enable_x64"):
        return jax.enable_x64(enabled)
    return importlib.import_module("jax.experimental").enable_x64(enabled)


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
