"""A mistake in a rule is an exception here, where users get a materialized gradient."""

import pytest

from dissect_optax.gradient_variance import _rules


@pytest.fixture(autouse=True)
def strict_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_rules, "STRICT", True)
