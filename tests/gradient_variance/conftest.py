"""A mistake in a rule is an exception here, where users get a materialized gradient.

The programs are exact however hard the compiler works, and compile a third faster
without its optimizations. Those of `benchmarks.variance_models` are tested with them.
"""

import pytest

from dissect_optax.gradient_variance import _rules


@pytest.fixture(autouse=True, scope="module")
def compiled_quickly(quick_compilation: None) -> None:
    del quick_compilation


@pytest.fixture(autouse=True)
def strict_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_rules, "STRICT", True)
