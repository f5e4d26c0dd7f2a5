"""Table 1 on any problem: the engine that trains, tunes, records and compares.

A `Problem` is parameters, the loss of one example, and data. Methods get equal budgets
for the choice of their step size, and replications with equal seeds share initial
parameters and mini-batches. A run passes through the modules in this order:
`_problem`, `_methods`, `_tuning` (which runs are wanted), `_running` (which are
missing, in which groups), `_training` and `_evaluation` (one compiled program each),
`_checkpoints`, `_records`.
"""

from dissect_optax.dissection import _requirements as _requirements  # Before all.
from dissect_optax.dissection._checkpoints import unfinished_groups
from dissect_optax.dissection._command import main
from dissect_optax.dissection._data import (
    Data,
    fingerprint,
    first_examples,
    hold_out,
    number_of_examples,
    sample_batch,
)
from dissect_optax.dissection._dissect import dissect, dissect_problem, mean_log_loss
from dissect_optax.dissection._effects import (
    CONFIDENCE,
    Effect,
    mean_and_std,
    paired_effect,
    share_interval,
    student_quantile,
)
from dissect_optax.dissection._environment import environment, processor
from dissect_optax.dissection._errors import UserError, first_line, unknown_name
from dissect_optax.dissection._evaluation import evaluate
from dissect_optax.dissection._exit_status import exit_status
from dissect_optax.dissection._locks import only_process
from dissect_optax.dissection._meshes import check_batch, make_mesh, parse_mesh
from dissect_optax.dissection._methods import (
    FOUR_METHODS,
    METHODS,
    Method,
    get_method,
    makes_optimizers,
)
from dissect_optax.dissection._problem import Problem, Settings, constant
from dissect_optax.dissection._processes import (
    is_primary,
    run_command,
    start,
    start_if,
)
from dissect_optax.dissection._progress import Monitor, SilentMonitor
from dissect_optax.dissection._records import (
    EqualWithNan,
    Measurement,
    Record,
    RunConfig,
    Store,
    digest,
    read_checked,
    record_to_json,
    to_text,
    write_atomically,
    write_checked,
)
from dissect_optax.dissection._result import Dissection
from dissect_optax.dissection._running import Diagnosis, Job, complete
from dissect_optax.dissection._training import (
    Replica,
    TrainState,
    advance,
    initialise,
    lower_gradient,
)
from dissect_optax.dissection._tuning import (
    FIRST_REPLICATION_SEED,
    MethodResult,
    Protocol,
    Tuned,
    best_accuracy,
    find_result,
    find_tuned,
    grid_point,
    missing_points,
    point_on_grid,
    replicate,
    select,
    step_size,
    tune,
)

__all__ = [  # noqa: RUF022  # In the order in which a run meets them.
    # Table 1 on a user's problem,
    "dissect",
    "Dissection",
    "main",
    "Effect",
    "dissect_problem",
    "mean_log_loss",
    "paired_effect",
    "mean_and_std",
    "student_quantile",
    "share_interval",
    "CONFIDENCE",
    # a problem and its data,
    "Problem",
    "Settings",
    "constant",
    "Data",
    "number_of_examples",
    "first_examples",
    "hold_out",
    "sample_batch",
    "fingerprint",
    # the methods that train it,
    "Method",
    "METHODS",
    "FOUR_METHODS",
    "get_method",
    "makes_optimizers",
    # one group of runs,
    "Replica",
    "TrainState",
    "initialise",
    "advance",
    "evaluate",
    "lower_gradient",
    # runs and their records,
    "Job",
    "Diagnosis",
    "complete",
    "Store",
    "unfinished_groups",
    "Record",
    "RunConfig",
    "Measurement",
    # the devices and processes that train them,
    "make_mesh",
    "parse_mesh",
    "check_batch",
    "start",
    "start_if",
    "is_primary",
    "run_command",
    # and the choice of the step size.
    "Protocol",
    "best_accuracy",
    "Tuned",
    "tune",
    "find_tuned",
    "replicate",
    "MethodResult",
    "find_result",
    "select",
    "missing_points",
    "FIRST_REPLICATION_SEED",
    "step_size",
    "grid_point",
    "point_on_grid",
    # Progress, files, errors.
    "Monitor",
    "SilentMonitor",
    "environment",
    "processor",
    "digest",
    "EqualWithNan",
    "read_checked",
    "write_checked",
    "write_atomically",
    "record_to_json",
    "to_text",
    "only_process",
    "UserError",
    "exit_status",
    "first_line",
    "unknown_name",
]
