"""Optimizers whose state is sharded, on eight devices."""

from dissect_optax import family
from tests.sharding.eight_devices import lines_of
from tests.transformations.subjects import SUBJECTS


def test_state_is_born_where_its_parameters_are_and_stays_there():
    lines = lines_of("optimizers", "transformations")
    assert [line["name"] for line in lines] == list(SUBJECTS)
    # Two parameters: the state before and after two updates, and the new parameters.
    assert all(line["typed"] == 3 * line["born"] + 2 for line in lines), lines
    assert {line["born"] for line in lines} >= {0, 2, 4}


def test_zero_spreads_the_state_and_gathers_the_updates():
    lines = lines_of("optimizers", "zero")
    assert [line["name"] for line in lines] == list(family.MEMBERS)
    for line in lines:
        assert line["error"] < 1e-5, line
        assert line["kept"], line
        # An eighth of every array; per-tensor numbers are on every device.
        arrays = line["state"] - line["scalars"]
        assert line["state on a device"] == arrays / 8 + line["scalars"], line
        # Gradients are added up, and with them their variances; updates are gathered.
        # XLA's CPU backend adds up whole arrays, of which each device takes its slice.
        travels = line["collectives"]
        assert travels["all-gather"][1] == line["parameters"], line
        reduced = sum(
            size
            for name, (_, size) in travels.items()
            if name in ("all-reduce", "reduce-scatter")
        )
        assert 0 < reduced <= (1 + line["needs variance"]) * line["parameters"] + 64
        assert set(travels) <= {"all-gather", "all-reduce", "reduce-scatter"}, line


def test_an_nnx_optimizer_keeps_the_model_where_it_is_told_to():
    with_constraint, without = lines_of("optimizers", "nnx")
    assert with_constraint["model on every device"]
    assert with_constraint["state spread"]
    # If this fails, docs/scaling.md need not ask for the constraint any more.
    assert not without["model on every device"]
