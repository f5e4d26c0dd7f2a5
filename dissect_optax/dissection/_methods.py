"""The methods that are compared: optimizers by name, with their label in the paper."""

import dataclasses
import difflib
import importlib
import inspect
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import dissect_optax
from dissect_optax import family
from dissect_optax.dissection._errors import UserError, first_line, unknown_name
from dissect_optax.dissection._modules import import_module
from dissect_optax.dissection._programs import program_digest, uses_first_argument

_NAME = re.compile(r"\w[\w.\-]{0,99}")

OptimizerFactory = Callable[[optax.ScalarOrSchedule], optax.GradientTransformation]


@dataclasses.dataclass(frozen=True)
class Method:
    """An optimizer with the settings of §A.2: all but the step size.

    Attributes:
      name: Public name in `dissect_optax`, or the path of an Optax optimizer.
      label: Name in figures and tables.
      factory: From a learning rate to the optimizer.
      first_guess: Step size where the search for the largest stable one begins. Far
        off it costs time. It is no bound, but of two that are stable with an unstable
        one between them it may decide which is found.
      needs_variance: Whether the optimizer asks for the mini-batch's gradient variance.
      identity: Digest of its program, where the name does not say which it is.
    """

    name: str
    label: str
    factory: OptimizerFactory
    first_guess: float = 1.0
    needs_variance: bool = False
    identity: str = ""


# M-SGD steps along the sum of about ten gradients, M-SVAG along their average, hence
# ten times larger step sizes. A step of the sign methods is a change of every weight.
_PAPER_METHODS = (
    Method("m_sgd", "M-SGD", dissect_optax.m_sgd, 6.0),
    Method("m_ssd", "M-SSD", dissect_optax.m_ssd, 0.3),
    Method("m_svag", "M-SVAG", dissect_optax.m_svag, 60.0),
    Method("adam", "ADAM", dissect_optax.adam, 1.0),
    Method("sgd", "SGD", dissect_optax.sgd, 1.0),
    Method("ssd", "SSD", dissect_optax.ssd, 0.1),
    Method("svag", "SVAG", dissect_optax.svag, 1.0),
    Method("adam_star", "ADAM*", dissect_optax.adam_star, 0.1),
    Method("m_svag_mb", "M-SVAG-mb", dissect_optax.m_svag_mb, 6.0, True),
    Method("adam_star_mb", "ADAM*-mb", dissect_optax.adam_star_mb, 0.1, True),
)
METHODS = {method.name: method for method in _PAPER_METHODS}
_NAMES_BY_LABEL = {method.label: method.name for method in _PAPER_METHODS}

# Table 1 of the paper, with momentum.
FOUR_METHODS = ("m_sgd", "m_ssd", "m_svag", "adam")


def get_method(name: str) -> Method:
    """The method of this name.

    Args:
      name: A named optimizer of this library (`m_svag`), a member of
        `dissect_optax.family` (`family.adabelief`), the path of any Optax optimizer
        whose first argument is the learning rate (`optax.adamw`), or module and name
        of a function of yours from a learning rate to an optimizer
        (`my_module:my_optimizer`).

    Returns:
      The method.

    Raises:
      UserError: There is none of this name, or it is not an optimizer.

    Examples:
      >>> get_method("m_svag").label
      'M-SVAG'
      >>> get_method("optax.adamw").label
      'optax.adamw'
      >>> get_method("msvag")
      Traceback (most recent call last):
      dissect_optax.dissection._errors.UserError: There is no optimizer ...
    """
    if name in METHODS:
        return METHODS[name]
    if ":" in name:
        return _imported(name)
    kind, _, member = name.partition(".")
    if kind == "family":
        return _member(member)
    if kind != "optax":
        raise UserError(
            unknown_name("optimizer", name, METHODS, _NAMES_BY_LABEL)
            + " An Optax optimizer is named by its path, such as 'optax.adamw', a"
            " member of the family by 'family.adabelief', one of yours by"
            " 'my_module:my_optimizer', for example."
        )
    module_name, _, attribute = name.rpartition(".")
    try:
        factory = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError):
        close = difflib.get_close_matches(name, _optax_paths(), n=1)
        question = f" Did you mean '{close[0]}'?" if close else ""
        raise UserError(
            f"Optax has no '{name}'.{question} Expected the path of an optimizer, such"
            " as 'optax.adamw' or 'optax.contrib.muon'."
        ) from None
    if not makes_optimizers(factory, 0.1):
        raise UserError(
            f"'{name}' is not an optimizer that needs a learning rate and gradients"
            " alone. Expected a path such as 'optax.adamw'."
        )
    return Method(name, name, factory, 0.1)


def _member(name: str) -> Method:
    """A member of the family."""
    if name not in family.MEMBERS:
        raise UserError(unknown_name("member of the family", name, family.MEMBERS))
    member = family.MEMBERS[name]
    # A step along a sign changes every weight by the step size.
    first_guess = 0.3 if "sign" in member.direction else 6.0
    return Method(
        f"family.{name}", name, member.factory, first_guess, member.needs_variance
    )


def _imported(name: str) -> Method:
    """An optimizer of the user's, from `module:function`."""
    module_name, _, attribute = name.partition(":")
    if not _NAME.fullmatch(module_name) or not attribute.isidentifier():
        raise UserError(
            f"'{name}' is not the place of an optimizer. Expected a module and a"
            " function in it, such as 'my_module:my_optimizer'."
        )
    try:
        module = import_module(module_name)
    except Exception as error:  # Whatever the user's module does.
        raise UserError(
            f"The module '{module_name}' of '{name}' cannot be imported"
            f" ({type(error).__name__}: {first_line(error)}). Is it in this directory,"
            " or installed?"
        ) from error
    if not callable(factory := getattr(module, attribute, None)):
        functions = [key for key, value in vars(module).items() if callable(value)]
        raise UserError(
            unknown_name(f"function in {module_name}", attribute, functions)
        )
    return _from_factory(name, attribute, f"'{name}'", factory)


def _optax_paths() -> list[str]:
    """Where optimizers may be in Optax."""
    modules = (optax, optax.contrib)
    return [f"{module.__name__}.{name}" for module in modules for name in dir(module)]


def makes_optimizers(factory: Any, learning_rate: optax.ScalarOrSchedule) -> bool:
    """Whether it takes this learning rate, and its optimizer nothing but gradients.

    Args:
      factory: Anything that Optax holds.
      learning_rate: A learning rate, or a schedule of it.

    Returns:
      Whether it is an optimizer's factory.

    Examples:
      >>> makes_optimizers(optax.rprop, 0.1)
      True
      >>> makes_optimizers(optax.rprop, optax.constant_schedule(0.1))
      False
      >>> makes_optimizers(optax.clip, 0.1)
      False
    """
    try:
        first, *_ = inspect.signature(factory).parameters
        optimizer = optax.with_extra_args_support(factory(learning_rate))
        params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
        state = jax.eval_shape(optimizer.init, params)
        jax.eval_shape(optimizer.update, params, state, params)
    except Exception:  # It may be anything that Optax holds.
        return False
    return first == "learning_rate"


def method_from(name: str, optimizer: Any) -> Method:
    """The method that a user names: a factory, or the name of one.

    Args:
      name: Name in tables and records.
      optimizer: From a learning rate to a `GradientTransformation`, or the name of a
        method as `get_method` takes it.

    Returns:
      The method. One whose update asks for `grad_variance` gets it.

    Raises:
      UserError: It is neither.

    Examples:
      >>> import functools
      >>> method_from("fast", functools.partial(optax.adam, b2=0.9)).needs_variance
      False
      >>> method_from("mb", dissect_optax.m_svag_mb).needs_variance
      True
    """
    if not _NAME.fullmatch(name):
        raise UserError(
            "The name of a method must consist of letters, digits, '_', '-' and '.',"
            f" got {name!r}."
        )
    if name in METHODS and optimizer != name:
        raise UserError(
            f"`extra[{name!r}]` must have another name: '{name}' is the method"
            f" {METHODS[name].label} of this library."
        )
    if isinstance(optimizer, str):
        # Two methods may be given the same name in one directory.
        method = get_method(optimizer)
        identity = f"{optimizer} {method.identity}".rstrip()
        return dataclasses.replace(method, name=name, label=name, identity=identity)
    return _from_factory(name, name, f"`extra[{name!r}]`", optimizer)


def _from_factory(name: str, label: str, given: str, factory: Any) -> Method:
    """The method of a user's factory; `given` is what an error calls it."""
    if isinstance(factory, optax.GradientTransformation):
        raise UserError(
            f"{given} must be a function from a learning rate to an"
            " optimizer, got an optimizer, whose learning rate is fixed. Pass `lambda"
            " learning_rate: optax.adamw(learning_rate)`, for example."
        )
    if not callable(factory):
        raise UserError(
            f"{given} must be a function from a learning rate to an"
            f" optimizer, such as `optax.adamw`, got {factory!r}."
        )
    errors = []
    for needs_variance in (False, True):
        try:
            identity = _program_of(factory, needs_variance=needs_variance)
        except Exception as error:
            errors.append(error)
        else:
            break
    else:
        raise UserError(
            f"{given} must be a function from a learning rate to an optimizer"
            f" that needs gradients and parameters alone: {first_line(errors[0])}"
        )
    if not uses_first_argument(*_step(factory, needs_variance=needs_variance)):
        raise UserError(
            f"The optimizer of {given} ignores its learning rate, so it has"
            " no step size to tune. Pass `lambda learning_rate:"
            " optax.adamw(learning_rate)`, for example."
        )
    return Method(name, label, factory, 0.1, needs_variance, identity)


def _program_of(factory: OptimizerFactory, *, needs_variance: bool) -> str:
    """Digest of one update by the optimizer."""
    return program_digest(*_step(factory, needs_variance=needs_variance))


def _step(factory: OptimizerFactory, *, needs_variance: bool) -> tuple[Any, float, Any]:
    """One update as a function of learning rate and parameters, and values of both."""
    params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
    extra_args = {"grad_variance": params} if needs_variance else {}

    def step(learning_rate: jax.Array, params: Any) -> Any:
        optimizer = optax.with_extra_args_support(factory(learning_rate))
        state = optimizer.init(params)
        return optimizer.update(params, state, params, **extra_args)

    return step, 0.1, params
