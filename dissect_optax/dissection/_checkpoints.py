"""Checkpoints of groups that are not finished, so that a killed run loses little.

    runs/digits/m_svag/unfinished/1f0c2a9b/
        group.json          the runs of the group
        checkpoints/        the newest state, by Orbax

The state of a group and all it has measured go into one checkpoint, which Orbax makes
visible when it is complete: a process that is killed while it writes, or that fills
the disk, leaves the previous checkpoint. A group that is resumed is the same program on
the same arrays, so its records are the same to the last bit (but for the seconds).

A checkpoint holds whole arrays, not the parts of devices: process 0 writes what it has
gathered, and reads for all processes. So a group can go on with another number of
devices or processes; its numbers are then the same to rounding.
"""

import contextlib
import dataclasses
import errno
import hashlib
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dissect_optax.dissection import _processes as processes
from dissect_optax.dissection._data import without_keys
from dissect_optax.dissection._errors import UserError, first_line
from dissect_optax.dissection._meshes import place
from dissect_optax.dissection._records import (
    Measurement,
    RunConfig,
    Store,
    config_from_json,
    config_to_json,
    digest,
    measurement_from_json,
    measurement_to_json,
    naming,
    read_checked,
    write_checked,
)
from dissect_optax.dissection._training import TrainState

# More runs than any device trains at a time.
_LARGEST_GROUP = 10_000


@dataclasses.dataclass(frozen=True)
class Group:
    """Runs of one method that are trained as one program.

    Attributes:
      configs: The runs.
      size: Replicas in the program; copies of the last run fill empty places.
      data: Fingerprint of the data that they are trained on.

    Raises:
      ValueError: There are no runs, more than `size`, or runs of several methods.
      TypeError: An entry has another type.
    """

    configs: tuple[RunConfig, ...]
    size: int
    data: str

    def __post_init__(self) -> None:
        if type(self.size) is not int or not isinstance(self.data, str):
            raise TypeError("a size or a fingerprint has the wrong type")
        if not 1 <= len(self.configs) <= self.size <= _LARGEST_GROUP:
            raise ValueError(f"{len(self.configs)} runs in a group of {self.size}")
        if len({(c.problem, c.optimizer, c.settings) for c in self.configs}) > 1:
            raise ValueError("its runs do not belong together")


@dataclasses.dataclass
class GroupProgress:
    """How far a group is: all that is needed to go on with it.

    Attributes:
      state: State of every member.
      step: Number of steps taken.
      seconds: Time it took so far, in all processes.
      evaluations: One list per run; that of a run that diverged ends there.
      diagnostics: Per run, measurements of its gradients by step.
    """

    state: TrainState
    step: int
    seconds: float
    evaluations: list[list[Measurement]]
    diagnostics: list[dict[int, dict[str, Any]]]


def _folder(store: Store, group: Group) -> Path:
    """Directory of a group's checkpoints."""
    first = group.configs[0]
    return (
        store.folder(first.problem, first.optimizer)
        / "unfinished"
        / digest([config_to_json(config) for config in group.configs])
    )


def _write_group(store: Store, group: Group) -> None:
    """Records which runs belong to the checkpoints, and the size of their group."""
    if (_folder(store, group) / "group.json").exists():
        # Of a group that goes on with copies for other devices; the size stays.
        return
    configs = [config_to_json(config) for config in group.configs]
    write_checked(
        _folder(store, group) / "group.json",
        {"size": group.size, "data": group.data, "configs": configs},
    )


def unfinished_groups(store: Store, problem: str, optimizer: str) -> list[Group]:
    """The groups that an earlier process left.

    Args:
      store: The directory of records.
      problem: Name of the problem.
      optimizer: Name of the method.

    Returns:
      The groups that have a checkpoint.

    Raises:
      UserError: The list of the runs that belong to a checkpoint is damaged.
    """
    return processes.from_primary(lambda: _unfinished(store, problem, optimizer))


def _unfinished(store: Store, problem: str, optimizer: str) -> list[Group]:
    """The same, in one process."""
    folder = store.folder(problem, optimizer) / "unfinished"
    groups = []
    for path in sorted(folder.glob("*/group.json")):
        with _as_user_error(path.parent):
            content = read_checked(path)
            configs = tuple(config_from_json(config) for config in content["configs"])
            group = Group(configs, content["size"], content["data"])
            if path.parent != _folder(store, group):
                raise ValueError("its runs belong to another directory")
            groups.append(group)
    return groups


def save(store: Store, group: Group, progress: GroupProgress) -> None:
    """Adds a checkpoint and drops the previous one.

    All processes call it at the same step.

    Args:
      store: The directory of records.
      group: The runs.
      progress: How far they are.

    Raises:
      OSError: The disk is full, say; the previous checkpoint is intact.
    """
    content = _to_bytes(progress.state)
    size = len(progress.state.step)
    measured = {
        "size": size,
        "seconds": progress.seconds,
        "evaluations": [
            [measurement_to_json(line) for line in lines]
            for lines in progress.evaluations
        ],
        "diagnostics": [
            {str(step): values for step, values in found.items()}
            for found in progress.diagnostics
        ],
        "layout": _layout(progress.state, size),
        "bytes": _digest(content),
    }
    measured["digest"] = digest(measured)
    processes.from_primary(
        lambda: _write(store, group, progress.step, content, measured)
    )


def _write(
    store: Store, group: Group, step: int, content: np.ndarray, measured: dict[str, Any]
) -> None:
    """Writes a checkpoint, in one process."""
    # Imported late: it takes seconds, and short jobs end before their first checkpoint.
    import orbax.checkpoint as ocp

    _write_group(store, group)
    folder = (_folder(store, group) / "checkpoints").absolute()
    folder.mkdir(parents=True, exist_ok=True)
    with (
        naming(folder),
        _full_disk_as_os_error(),
        ocp.CheckpointManager(
            folder,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=1, enable_async_checkpointing=False, **_alone()
            ),
        ) as manager,
    ):
        _require_space(folder, content.nbytes)
        manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave({"bytes": content}),
                measured=ocp.args.JsonSave(measured),
            ),
        )


def _alone() -> dict[str, Any]:
    """Options of Orbax for process 0 alone, which would wait for the others."""
    if processes.count() == 1:
        return {}
    import orbax.checkpoint as ocp  # Imported late, see above.

    return {
        "create": False,
        "multiprocessing_options": ocp.options.MultiprocessingOptions(
            primary_host=0, active_processes={0}, barrier_sync_key_prefix="process_0"
        ),
    }


def _require_space(folder: Path, needed: int) -> None:
    """Raises before any of the state is written if the disk has no room for it."""
    if shutil.disk_usage(folder).free < needed:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@contextlib.contextmanager
def _full_disk_as_os_error() -> Iterator[None]:
    """Re-raises Orbax's error of a full disk as that of the operating system."""
    try:
        yield
    except ValueError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error


def _layout(state: TrainState, size: int) -> list[str]:
    """Types and shapes of a state of so many runs, in the order of its bytes."""
    return [f"{leaf.dtype}{[size, *leaf.shape[1:]]}" for leaf in jax.tree.leaves(state)]


def _to_bytes(state: TrainState) -> np.ndarray:
    """All of a state in one array.

    Orbax reads several arrays at a time. Where one is damaged it leaves the others half
    read, and they raise warnings later. It does not save empty arrays, either.
    """
    parts = [processes.gathered(leaf) for leaf in jax.tree.leaves(state)]
    return np.concatenate([part.reshape(-1).view(np.uint8) for part in parts])


def _digest(content: np.ndarray) -> str:
    """Digest of the bytes: not every storage keeps them."""
    return hashlib.sha256(content.data).hexdigest()


def _from_bytes(
    content: np.ndarray, template: TrainState, size: int, runs: int
) -> TrainState:
    """The inverse of `_to_bytes`, on the devices of the template.

    Args:
      content: The bytes of a state of `size` runs.
      template: A state of as many runs as are wanted.
      size: Runs in the content.
      runs: How many of them count; the others are copies of the last one.

    Returns:
      The state. Where it has another number of runs, copies are left out or added.
    """
    leaves, structure = jax.tree.flatten(template)
    restored, end = [], 0
    for leaf, like in zip(leaves, _shapes(template, size), strict=True):
        start, end = end, end + _nbytes(like)
        numbers = content[start:end].view(like.dtype).reshape(like.shape)
        if size != len(leaf):
            numbers = numbers[np.minimum(np.arange(len(leaf)), runs - 1)]
        restored.append(place(_with_numbers(leaf, numbers), leaf.sharding))
    return jax.tree.unflatten(structure, restored)


def _shapes(state: TrainState, size: int) -> list[jax.ShapeDtypeStruct]:
    """The numbers in a state of so many runs, array by array."""
    numbers = jax.eval_shape(lambda: [*map(without_keys, jax.tree.leaves(state))])
    return [
        jax.ShapeDtypeStruct((size, *like.shape[1:]), like.dtype) for like in numbers
    ]


def _nbytes(like: jax.ShapeDtypeStruct) -> int:
    """Bytes of an array of this shape."""
    return math.prod(like.shape) * like.dtype.itemsize


def _bytes_of(template: TrainState, size: int) -> int:
    """Bytes of a state of so many runs."""
    return sum(map(_nbytes, _shapes(template, size)))


def _with_numbers(leaf: jax.Array, numbers: np.ndarray) -> jax.Array:
    """The inverse of `numbers_of`, for an array of this kind."""
    array = jnp.array(numbers)
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(array, impl=jax.random.key_impl(leaf))
    return array


def restore(store: Store, group: Group, template: TrainState) -> GroupProgress | None:
    """The newest checkpoint of a group.

    Args:
      store: The directory of records.
      group: The runs.
      template: A state of this group, before its first step for example. It says on
        which devices the group goes on, and may have another number of copies of the
        last run.

    Returns:
      How far the group is, None without a checkpoint.

    Raises:
      UserError: The checkpoint is damaged, or not one of this group.
    """
    found = processes.from_primary(lambda: _read(store, group, template))
    if found is None:
        return None
    step, measured, content = found
    with _as_user_error(_folder(store, group)):
        size = measured["size"]
        state = _from_bytes(content, template, size, len(group.configs))
        if np.any(processes.gathered(state.step) != step):
            raise ValueError("its directory has the name of another step")
        return GroupProgress(
            state=state,
            step=step,
            seconds=float(measured["seconds"]),
            evaluations=[
                [measurement_from_json(line) for line in lines]
                for lines in measured["evaluations"]
            ],
            diagnostics=[
                {int(step): values for step, values in found.items()}
                for found in measured["diagnostics"]
            ],
        )


def _read(
    store: Store, group: Group, template: TrainState
) -> tuple[int, dict[str, Any], np.ndarray] | None:
    """Step, measurements and bytes of the newest checkpoint, in one process."""
    folder = _folder(store, group)
    if not (folder / "checkpoints").is_dir():
        return None
    import orbax.checkpoint as ocp  # Imported late, see above.

    with ocp.CheckpointManager(
        (folder / "checkpoints").absolute(),
        options=ocp.CheckpointManagerOptions(**_alone()),
    ) as manager:
        step = manager.latest_step()
        if step is None:
            return None
        with _as_user_error(folder):
            measured = manager.restore(
                step, args=ocp.args.Composite(measured=ocp.args.JsonRestore())
            ).measured
            if measured.pop("digest") != digest(measured):
                raise ValueError("its measurements are not those that were written")
            # Rounded up for the devices of the process that wrote it.
            size = measured.setdefault("size", group.size)
            if size < group.size:
                raise ValueError("it holds fewer runs than its group")
            if measured["layout"] != _layout(template, size):
                raise ValueError("its arrays are not those of this optimizer")
            if len(measured["evaluations"]) != len(group.configs):
                raise ValueError("it is not one of these runs")
            blank = {"bytes": np.empty(_bytes_of(template, size), np.uint8)}
            content = manager.restore(
                step, args=ocp.args.Composite(state=ocp.args.StandardRestore(blank))
            ).state["bytes"]
            if measured["bytes"] != _digest(content):
                raise ValueError("its numbers are not those that were written")
            return step, measured, content


@contextlib.contextmanager
def _as_user_error(folder: Path) -> Iterator[None]:
    """Re-raises read failures as a UserError."""
    try:
        yield
    except Exception as error:  # Orbax raises what its readers do, `Exception` too.
        raise UserError(
            f"The checkpoint in {folder} cannot be read: {first_line(error)} Remove"
            " that directory to begin these runs again."
        ) from error


def remove(store: Store, group: Group) -> None:
    """Removes the checkpoints of a group whose records are written."""
    processes.from_primary(lambda: _remove(_folder(store, group)))


def _remove(folder: Path) -> None:
    """The same, in one process."""
    shutil.rmtree(folder, ignore_errors=True)
    # There may be other groups, or none may ever have had a checkpoint.
    with contextlib.suppress(OSError):
        folder.parent.rmdir()
