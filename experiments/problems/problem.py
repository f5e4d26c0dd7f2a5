"""A problem of the experiments: what the engine trains, and what the paper says."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
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


def loss_without_noise(
    evaluate: Callable[[Any, Any], tuple[jax.Array, Mapping[str, jax.Array]]],
) -> Callable[[Any, Any, jax.Array], jax.Array]:
    """The loss in training where nothing is random: that of an evaluation."""

    def loss(params: Any, example: Any, key: jax.Array) -> jax.Array:
        del key
        return evaluate(params, example)[0]

    return loss


def half_squared_norm(params: Any, strength: float) -> jax.Array:
    """½λ‖w‖² over all arrays of a tree."""
    squares = [jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(params)]
    return 0.5 * strength * sum(squares, start=jnp.zeros(()))


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
