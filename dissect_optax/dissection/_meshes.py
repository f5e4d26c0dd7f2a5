"""Devices as a mesh: which of them train which runs, and which examples of a batch.

A mesh has two axes. The runs of a group, which differ in step size and seed, are
divided over `replica`, and the examples of every mini-batch over `data`. The program is
the same for one device and for many; only the shardings of its arrays differ. Indices
of a mini-batch follow from the seed and the step, so every device draws those of its
own runs and examples, and nothing is sent but the sums over a mini-batch.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dissect_optax.dissection._errors import UserError, unknown_name

PyTree = Any

REPLICA, DATA = "replica", "data"
_EXPECTED = "such as `data=8` or `replica=4,data=2`"


def parse_mesh(text: str) -> dict[str, int]:
    """The sizes of the axes that a command line gives.

    Args:
      text: Axes with their sizes, separated by commas.

    Returns:
      Sizes by name.

    Raises:
      UserError: It is not a list of axes with their sizes.

    Examples:
      >>> parse_mesh("replica=4,data=2")
      {'replica': 4, 'data': 2}
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = (word.strip() for word in part.partition("="))
        if not name or not size.isdecimal() or name in sizes:
            raise UserError(
                f"A mesh must be axes with their sizes, {_EXPECTED}, got '{text}'."
            )
        sizes[name] = int(size)
    return sizes


def make_mesh(given: Mapping[str, int] | Mesh) -> Mesh:
    """The mesh that a caller asks for, with both axes.

    Args:
      given: Sizes of the axes `replica` and `data`, of which one may be missing; or a
        `jax.sharding.Mesh` with these axes.

    Returns:
      The mesh, with axes that the compiler divides (`AxisType.Auto`). Sizes take the
      first devices of `jax.devices()`.

    Raises:
      UserError: An axis has another name or size, there are not so many devices, or
        devices of some process are left out.
    """
    if isinstance(given, Mesh):
        sizes, devices = dict(given.shape), given.devices
    elif isinstance(given, Mapping):
        sizes, devices = dict(given), None
    else:
        raise UserError(
            "`mesh` must be a dictionary of axes, {'replica': 4, 'data': 2}, or a"
            f" `jax.sharding.Mesh`, got {given!r}."
        )
    for name, size in sizes.items():
        if name not in (REPLICA, DATA):
            raise UserError(unknown_name("mesh axis", str(name), (REPLICA, DATA)))
        if type(size) is not int or size < 1:
            raise UserError(
                f"The mesh axis `{name}` must have a positive integer as its size, got"
                f" {size!r}."
            )
    shape = sizes.get(REPLICA, 1), sizes.get(DATA, 1)
    if devices is None:
        devices = _first_devices(shape[0] * shape[1])
    elif list(sizes)[:1] == [DATA]:
        devices = devices.T
    return _mesh(devices.reshape(shape))


def _first_devices(count: int) -> np.ndarray:
    """So many devices; with several processes, all of them."""
    available = jax.devices()
    if count > len(available):
        hint = ""
        if jax.default_backend() == "cpu":
            hint = (
                " XLA_FLAGS=--xla_force_host_platform_device_count="
                f"{count} in the environment divides the CPU into virtual devices."
            )
        raise UserError(
            f"The mesh needs {count} devices, and JAX finds {len(available)}.{hint}"
        )
    if count < len(available) and jax.process_count() > 1:
        raise UserError(
            f"The mesh has {count} devices, expected all {len(available)} devices of"
            f" the {jax.process_count()} processes."
        )
    return np.array(available[:count])


def _mesh(devices: np.ndarray) -> Mesh:
    """The mesh of an array of devices `[replica, data]`."""
    return Mesh(devices, (REPLICA, DATA), axis_types=(AxisType.Auto,) * 2)


@functools.cache
def usual_mesh(runs: int, batch_size: int) -> Mesh:
    """All devices: on the replica axis for a group, on the data axis for one run.

    Args:
      runs: Runs that are trained at a time.
      batch_size: Examples per mini-batch.

    Returns:
      The mesh. One run takes as many devices as divide its mini-batch evenly.

    Raises:
      UserError: There are several processes, and their devices do not divide it.
    """
    devices = np.array(jax.devices())
    if runs > 1:
        return _mesh(devices[:, None])
    count = max(n for n in range(1, len(devices) + 1) if batch_size % n == 0)
    if count < len(devices) and jax.process_count() > 1:
        raise UserError(
            f"The {len(devices)} devices of {jax.process_count()} processes do not"
            f" divide a mini-batch of {batch_size} evenly. Choose a batch size that is"
            f" a multiple of {len(devices)}, or a mesh with fewer devices on the axis"
            " `data` and the others on `replica`."
        )
    return _mesh(devices[None, :count])


def check_batch(mesh: Mesh, batch_size: int) -> None:
    """Raises unless the devices divide a mini-batch evenly.

    Raises:
      UserError: They do not.
    """
    devices = mesh.shape[DATA]
    if batch_size % devices:
        raise UserError(
            f"The mesh has {devices} devices on the axis `data`, which do not divide a"
            f" mini-batch of {batch_size} evenly. Choose a batch size that is a"
            f" multiple of {devices}, or another mesh."
        )


def whole_replicas(mesh: Mesh, size: int) -> int:
    """The size of a group, rounded up so that every device has as many runs.

    Examples:
      >>> mesh = make_mesh({"replica": 1})
      >>> whole_replicas(mesh, 10)
      10
    """
    devices = mesh.shape[REPLICA]
    return -(-size // devices) * devices


# ---- Shardings --------------------------------------------------------------------


def over_replicas(mesh: Mesh) -> NamedSharding:
    """Of arrays `[replicas, ...]` of a group."""
    return NamedSharding(mesh, PartitionSpec(REPLICA))


def everywhere(mesh: Mesh) -> NamedSharding:
    """Of arrays that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def constrain(tree: PyTree, mesh: Mesh, *axes: str) -> PyTree:
    """Divides the leading axes of arrays of one run, inside a program.

    Args:
      tree: Arrays of one run. Under `jax.vmap` with `spmd_axis_name=REPLICA`, the runs
        of a group are divided, too.
      mesh: The mesh.
      *axes: Names of mesh axes; without one, each device holds the arrays whole.

    Returns:
      The same arrays.
    """
    sharding = NamedSharding(mesh, PartitionSpec(*axes))
    return jax.tree.map(
        lambda leaf: jax.lax.with_sharding_constraint(leaf, sharding), tree
    )


def place(tree: PyTree, sharding: NamedSharding) -> PyTree:
    """Arrays that this process has whole, on the devices of a mesh.

    Args:
      tree: Arrays; every process has the same.
      sharding: How they are divided.

    Returns:
      Global arrays, of which each process holds the parts of its devices.
    """
    if sharding.is_fully_addressable:
        return jax.device_put(tree, sharding)

    def placed(array: Any) -> jax.Array:
        # `device_put` would compare the numbers of all processes.
        indices = sharding.addressable_devices_indices_map(array.shape)
        parts = [
            jax.device_put(array[index], device) for device, index in indices.items()
        ]
        return jax.make_array_from_single_device_arrays(array.shape, sharding, parts)

    return jax.tree.map(placed, tree)
