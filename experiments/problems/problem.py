"""A problem of the experiments: what the engine trains, and what the paper says."""

import dataclasses
import functools
from collections.abc import Callable, Mapping

import jax
from flax import nnx

from dissect_optax.dissection import Problem, Settings


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class ExperimentProblem(Problem):
    """A problem with a name on the command line; one of its metrics is `accuracy`.

    Attributes:
      smoke: Settings with which a command does little but compile.
      published: The paper's test accuracies as it prints them, by the method's name.
    """

    smoke: Settings
    published: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class NetworkFunctions:
    """A Flax NNX network as pure functions of its parameters.

    Attributes:
      build: From random streams to a module whose only variables are `nnx.Param`.
    """

    build: Callable[[nnx.Rngs], nnx.Module]

    @functools.cached_property
    def _structure(self) -> nnx.GraphDef:
        """The network without its parameters."""
        # Outside of any trace that asks for it first: a program must not depend on
        # whether training or evaluation was traced before it.
        with jax.ensure_compile_time_eval():
            shapes = nnx.eval_shape(lambda: self.build(nnx.Rngs(0)))
        return nnx.split(shapes, nnx.Param)[0]

    def init(self, key: jax.Array) -> nnx.State:
        """Initial parameters."""
        return nnx.state(self.build(nnx.Rngs(key)), nnx.Param)

    def apply(self, params: nnx.State, *inputs: object) -> jax.Array:
        """The network at these parameters."""
        module: Callable[..., jax.Array] = nnx.merge(self._structure, params)
        return module(*inputs)
