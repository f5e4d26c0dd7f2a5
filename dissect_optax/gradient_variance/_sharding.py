"""A batch that is spread over the devices of a mesh.

Every device takes the moments of its own examples, and the parts are merged
(`_merging`); so nothing travels but two arrays of the size of each parameter, the mean
and the spread. Each device's work is a `jax.shard_map` over the axes that the batch is
spread over. Its other axes stay with the compiler, which divides the work along them as
the sharding of the parameters says.

With axes of type Explicit the types of the arrays say which axes these are. The program
of one example knows nothing of such types, and is run with all axes of type Auto
(`jax.sharding.auto_axes`); the results get the sharding of the parameters back. With
axes of type Auto nobody but the caller knows, and says so by `batch_sharding`.
"""

import contextlib
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

PyTree = Any
BatchSharding = NamedSharding | PartitionSpec | None


class Spread(NamedTuple):
    """Where the examples of a batch are."""

    mesh: Any
    axes: tuple[str, ...]
    """Mesh axes over which the leading axis of the batch is spread; may be none."""

    @property
    def parts(self) -> int:
        """Number of parts that the batch has."""
        return math.prod(self.mesh.shape[a] for a in self.axes)

    def axes_of_type(self, kind: AxisType) -> tuple[str, ...]:
        """All axes of the mesh that have some type."""
        named = zip(self.mesh.axis_names, self.mesh.axis_types, strict=True)
        return tuple(name for name, own in named if own == kind)


def spread_of(
    batch: PyTree, others: PyTree, batch_sharding: BatchSharding
) -> Spread | None:
    """Where the examples are, by their types or by what the caller says.

    `others` are all other arrays. None if no mesh has a say: all arrays are on one
    device, or the axes are those of an enclosing `jax.shard_map`.
    """
    typed = _spread_by_type(batch, others)
    if batch_sharding is None:
        return typed
    said = _spread_by_argument(batch_sharding)
    if typed is not None and typed.axes and typed.axes != said.axes:
        raise ValueError(
            f"The leading axis of `batch` is spread over the mesh axes {typed.axes}, "
            f"but `batch_sharding` says {said.axes}. With axes of type Explicit it can "
            "be left out."
        )
    return said


def check_exclusive(batch_sharding: BatchSharding, axis_name: Any) -> None:
    """Reject two answers to where the examples are."""
    if batch_sharding is not None and axis_name is not None:
        raise ValueError(
            "`batch_sharding` and `axis_name` exclude each other, got "
            f"{batch_sharding!r} and {axis_name!r}. Inside `jax.shard_map` use "
            "`axis_name`, outside of it `batch_sharding`."
        )


def check_divisible(size: int, spread: Spread) -> None:
    """Reject a batch that does not have as many examples on every device."""
    if size % spread.parts:
        raise ValueError(
            f"A batch of {size} examples cannot be spread evenly over the "
            f"{spread.parts} devices along the mesh axes {spread.axes}. Drop the last "
            f"{size % spread.parts}, or add examples whose `weights` are zero."
        )


def run_spread(
    function: Callable[..., Any], spread: Spread, shared: PyTree, examples: PyTree
) -> Any:
    """`function(shared, examples)` on every device, with its part of the examples.

    It returns `(values, likes, stacked)`: values that are the same on all devices; a
    pair of array lists with the sharding of the array list `shared[0]`; and a tree of
    arrays with the leading axis of the examples.
    """
    by_example = PartitionSpec(spread.axes) if spread.axes else PartitionSpec()
    run = functools.partial(_run_mapped, function, spread, by_example)
    explicit = spread.axes_of_type(AxisType.Explicit)
    if not explicit:
        return run(shared, examples)
    like = [_spec(leaf) for leaf in shared[0]]
    as_auto = jax.sharding.auto_axes(
        run,
        axes=explicit,
        out_sharding=(PartitionSpec(), (like, like), by_example),
    )
    with _context(spread.mesh):
        return as_auto(shared, examples)


def _run_mapped(
    function: Callable[..., Any],
    spread: Spread,
    by_example: PartitionSpec,
    shared: PyTree,
    examples: PyTree,
) -> Any:
    """`run_spread`, where no axis has the type Explicit any more."""
    if not spread.axes:
        return function(shared, examples)
    in_context = not jax.sharding.get_abstract_mesh().empty
    mapped = jax.shard_map(
        function,
        # The context knows the types that the axes have here.
        mesh=None if in_context else spread.mesh,
        in_specs=(PartitionSpec(), by_example),
        out_specs=(PartitionSpec(), PartitionSpec(), by_example),
        axis_names=set(spread.axes),
        # The function is a program for one device, whose types say nothing.
        check_vma=False,
    )
    return mapped(shared, examples)


def _context(mesh: Any) -> contextlib.AbstractContextManager[Any]:
    """The context of a mesh, for where only the types of arrays know it."""
    if not jax.sharding.get_abstract_mesh().empty:
        return contextlib.nullcontext()
    if not hasattr(jax.sharding, "use_abstract_mesh"):
        raise ValueError(
            "The arrays are on a mesh with axes of type Explicit, and no mesh is in "
            f"context, as JAX {jax.__version__} needs it. Call within "
            "`with jax.sharding.use_mesh(mesh):`."
        )
    return jax.sharding.use_abstract_mesh(mesh)


# ---- What is known of arrays ---------------------------------------------------------


def _spread_by_type(batch: PyTree, others: PyTree) -> Spread | None:
    """Where the examples are, by the types of the arrays."""
    leading: dict[str, tuple[str, ...]] = {}
    meshes = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(batch):
        spec = _spec(leaf)
        if any(_names(entry) for entry in spec):
            meshes.append(jax.typeof(leaf).sharding.mesh)
        if spec and _names(spec[0]):
            leading[jax.tree_util.keystr(path)] = _names(spec[0])
    for leaf in jax.tree.leaves(others):
        if any(_names(entry) for entry in _spec(leaf)):
            meshes.append(jax.typeof(leaf).sharding.mesh)
    if not meshes:
        return None
    if len(set(leading.values())) > 1:
        raise ValueError(
            "The leaves of `batch` (and `weights`) are spread over different mesh axes "
            f"along their leading axis: {leading}. Give all of them one sharding."
        )
    return Spread(meshes[0], next(iter(leading.values()), ()))


def _spread_by_argument(sharding: Any) -> Spread:
    """Where the examples are, by `batch_sharding`."""
    context = jax.sharding.get_abstract_mesh()
    if isinstance(sharding, NamedSharding):
        mesh, spec = sharding.mesh, sharding.spec
    elif isinstance(sharding, PartitionSpec):
        mesh, spec = context, sharding
        if context.empty:
            raise ValueError(
                f"`batch_sharding={sharding!r}` needs a mesh in context, as by "
                "`jax.set_mesh(mesh)`. Or pass `NamedSharding(mesh, spec)`."
            )
    else:
        raise TypeError(
            "`batch_sharding` must be a `jax.sharding.NamedSharding` or "
            f"`PartitionSpec`, got {type(sharding).__name__}."
        )
    axes = _names(spec[0]) if spec else ()
    # In a context the types are those of the context.
    spread = Spread(mesh if context.empty else context, axes)
    unknown = [a for a in axes if a not in spread.mesh.axis_names]
    if unknown:
        raise ValueError(
            f"`batch_sharding` names the mesh axes {unknown}, but the mesh in context "
            f"has {spread.mesh.axis_names}."
        )
    manual = [a for a in axes if a in spread.axes_of_type(AxisType.Manual)]
    if manual:
        raise ValueError(
            f"`batch_sharding` names the mesh axes {manual}, along which "
            "`jax.shard_map` has split the batch already. Use `axis_name` there."
        )
    return spread


def _spec(leaf: Any) -> PartitionSpec:
    """The part of a type that says over which axes of type Explicit an array is."""
    sharding = getattr(jax.typeof(leaf), "sharding", None)
    spec = getattr(sharding, "spec", None)
    return PartitionSpec() if spec is None else spec


def _names(entry: Any) -> tuple[str, ...]:
    """The mesh axes in one entry of a `PartitionSpec`."""
    if entry is None or entry is PartitionSpec.UNCONSTRAINED:
        return ()
    return tuple(entry) if isinstance(entry, tuple) else (entry,)
