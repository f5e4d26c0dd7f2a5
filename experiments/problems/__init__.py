"""The test problems, one file each."""

import importlib

from dissect_optax.dissection import UserError, unknown_name
from experiments.problems.problem import ExperimentProblem

__all__ = ["PROBLEMS", "ExperimentProblem", "get_problem"]

# In the order of tables and figures. A problem is imported when it is asked for, so
# that none needs the data libraries of another.
PROBLEMS = (
    "digits",
    "mnist",
    "cifar10",
    "cifar100",
    "transformer",
    "imbalance",
    "logistic",
)


def get_problem(name: str) -> ExperimentProblem:
    """The problem of this name, from the file of the same name in this folder.

    Args:
      name: One of `PROBLEMS`.

    Returns:
      The problem.

    Raises:
      UserError: There is none of this name.

    Examples:
      >>> get_problem("digits").title
      'Digits'
    """
    if name not in PROBLEMS:
        raise UserError(unknown_name("problem", name, PROBLEMS))
    return importlib.import_module(f"experiments.problems.{name}").PROBLEM
