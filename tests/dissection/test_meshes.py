"""Groups on eight virtual devices are those on one device, to rounding."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from dissect_optax.dissection import UserError, dissect, make_mesh, parse_mesh
from tests.dissection import small_problems
from tests.dissection.toys import job, train
from tests.virtual_devices import eight_devices

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What the script finds; one process for all tests."""
    root = tmp_path_factory.mktemp("meshes")
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "tests.dissection.meshes", str(root)],
        cwd=REPOSITORY,
        env=eight_devices() | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_groups_are_the_same_on_every_mesh(found):
    lines = found["differences"]
    assert [(line["runs"], line["mesh"]) for line in lines] == [
        (8, {"replica": 8}),
        (8, {"data": 8}),
        (8, {"replica": 4, "data": 2}),
        (1, {"data": 8}),
    ]
    for line in lines:
        assert line["params"] < 1e-4, line
        assert line["losses"] < 1e-4, line


def test_only_sums_over_the_mini_batch_are_sent(found):
    for line in found["differences"]:
        sums = line["collectives"].pop("all-reduce")
        assert set(line["collectives"].values()) == {0}, line
        if line["mesh"].get("data", 1) == 1:
            assert sums == 0, line
        else:
            assert 1 <= sums <= 8, line


def test_all_devices_are_used_by_default(found):
    one, several = found["usual"]
    # 6 of 8 devices divide a mini-batch of 6 evenly.
    assert one == [1, 1, {"replica": 1, "data": 6}]
    count, size, mesh = several
    # One of the three is the run that is finished.
    assert (count, mesh) == (2, {"replica": 8, "data": 1})
    assert size % 8 == 0


def test_a_group_goes_on_with_other_devices(found):
    resumed, whole = found["resumed"]
    assert len(resumed) == 3
    for losses, expected in zip(resumed, whole, strict=True):
        assert losses == pytest.approx(expected, rel=1e-4)


def test_a_diagnosis_sees_the_parameters_of_its_run(found):
    one, many = found["diagnosed"]
    assert one[0] == many[0] == {}
    assert list(one[1]) == ["0", "10", "20"]
    for step, values in one[1].items():
        assert many[1][step]["norm"] == pytest.approx(values["norm"], rel=1e-4)


def test_a_mesh_that_cannot_be_is_a_sentence(found):
    too_large, uneven = found["mistakes"]
    assert "needs 16 devices, and JAX finds 8. XLA_FLAGS=" in too_large
    assert (
        "3 devices on the axis `data`, which do not divide a mini-batch of 8" in uneven
    )
    # Axes of a mesh may come in any order, and be those that a program divides itself.
    assert found["given"] == {"replica": 2, "data": 4}


# ---- On one device ----------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["", "data", "data=", "data=x", "data=-1", "data=2,data=2", "=2", "data=2;"]
)
def test_text_that_is_no_mesh_is_a_sentence(text):
    with pytest.raises(UserError, match="axes with their sizes, such as `data=8`"):
        parse_mesh(text)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"date": 1}, "There is no mesh axis 'date'. Did you mean 'data'"),
        ({"data": 0}, "`data` must have a positive integer as its size, got 0"),
        ({"data": 1.0}, "`data` must have a positive integer as its size, got 1.0"),
        ({"replica": True}, "`replica` must have a positive integer"),
        ({"data": 64}, "The mesh needs 64 devices, and JAX finds"),
        ("data=1", "must be a dictionary of axes"),
    ],
)
def test_what_is_no_mesh_is_a_sentence(given, sentence):
    with pytest.raises(UserError, match=sentence):
        make_mesh(given)


def test_a_record_says_on_which_mesh_it_was_trained():
    record = train(job(None, mesh=make_mesh({"data": 1})), "m_sgd")
    assert record.environment["mesh"] == {"replica": 1, "data": 1}
    assert record.environment["processes"] == 1
    assert record.environment["devices"] == jax.device_count()


def test_dissect_takes_a_mesh():
    arguments = small_problems.arguments(budget="race", steps=10)
    given = jax.make_mesh((1,), ("data",))
    one, other = (dissect(**arguments, mesh=mesh) for mesh in (None, given))
    assert [run.training_loss for run in one.runs] == [
        run.training_loss for run in other.runs
    ]
    with pytest.raises(UserError, match="The mesh needs 64 devices"):
        dissect(**arguments, mesh={"data": 64})
