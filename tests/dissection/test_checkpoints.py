"""A checkpoint that is not the one that was written ends in one sentence."""

import dataclasses
import json
import math
import os
import re
import shutil

import pytest

from dissect_optax.dissection import (
    METHODS,
    UserError,
    digest,
    read_checked,
    write_checked,
)
from tests.dissection.toys import job, train, without_seconds

# What it has measured, and its arrays, of which Orbax keeps small ones twice.
MEASURED, ARRAYS = "measured/metadata", "state/**/d/*"


@pytest.fixture(scope="module")
def unfinished(tmp_path_factory):
    """Directory of a run that was stopped after its last step, to be copied."""
    runs = tmp_path_factory.mktemp("unfinished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dissect_optax.dissection._checkpoints.remove", lambda *_: None)
        train(job(runs, checkpoint_seconds=0.0))
    (record,) = runs.glob("toy/*/rate*.json")
    record.unlink()
    return runs


@pytest.fixture
def runs(unfinished, tmp_path):
    """A directory with an unfinished run, in another one that must stay as it is."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "file").write_text("not ours")
    return shutil.copytree(unfinished, tmp_path / "runs")


@pytest.fixture
def checkpoint(runs):
    (checkpoint,) = runs.glob("toy/*/unfinished/*")
    return checkpoint


def everything_below(directory):
    return {
        path.relative_to(directory): path.read_bytes() if path.is_file() else None
        for path in directory.rglob("*")
    }


def assert_named(runs, checkpoint, reason=""):
    """One sentence, and nothing is written or removed outside."""
    outside = everything_below(runs.parent)
    with pytest.raises(UserError) as caught:
        train(job(runs))
    message = str(caught.value)
    assert f"The checkpoint in {checkpoint} cannot be read: " in message
    assert message.endswith("Remove that directory to begin these runs again.")
    assert re.search(reason, message), message
    assert "\n" not in message
    assert len(message) < 1000
    now = everything_below(runs.parent)
    # Of the lock there may be more than before.
    assert {
        path for path in now.keys() - outside.keys() if path.name != ".lock"
    } == set()
    assert {path: now.get(path) for path in outside} == outside
    shutil.rmtree(checkpoint)
    train(job(runs))


def cut_off(content):
    return content[:3]


def one_bit_changed(content):
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 64]) + content[middle + 1 :]


def replaced(old, new):
    return lambda content: re.sub(old, new, content, count=1)


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("group.json", cut_off),
        ("group.json", lambda content: b""),
        ("group.json", lambda content: b"[" * 100_000),
        ("group.json", lambda content: b"\xff" + content),
        ("group.json", replaced(rb'"size": \d+', b'"size": null')),
        ("group.json", replaced(rb'"seed": \d+', b'"seed": 7')),
        ("group.json", replaced(rb"(?s)\[.*\]", b"[]")),
        (f"checkpoints/20/{MEASURED}", cut_off),
        (f"checkpoints/20/{MEASURED}", replaced(b"seconds", b"sexonds")),
        (f"checkpoints/20/{MEASURED}", replaced(rb'_loss": [\d.]+', b'_loss": "x"')),
        # A number for another one.
        (f"checkpoints/20/{MEASURED}", replaced(rb'_loss": [\d.]+', b'_loss": 0.25')),
        (
            f"checkpoints/20/{MEASURED}",
            replaced(rb'accuracy": [\d.]+', b'accuracy": 1'),
        ),
        (f"checkpoints/20/{MEASURED}", replaced(rb'"step": 10', b'"step": 11')),
        (f"checkpoints/20/{ARRAYS}", cut_off),
        (f"checkpoints/20/{ARRAYS}", one_bit_changed),
    ],
)
def test_damaged_checkpoint_is_named(file, damage, runs, checkpoint):
    damaged = list(checkpoint.glob(file))
    assert damaged
    for path in damaged:
        content = path.read_bytes()
        assert damage(content) != content
        path.write_bytes(damage(content))
    assert_named(runs, checkpoint)


def test_checkpoint_of_another_step_is_named(runs, checkpoint):
    directory = checkpoint / "checkpoints"
    (directory / "20").rename(directory / "10")
    assert_named(runs, checkpoint, "another step")


def first_config(content):
    return content["configs"][0]


def size(value):
    return lambda content: content.update(size=value)


def config(**values):
    return lambda content: first_config(content).update(values)


def settings(**values):
    return lambda content: first_config(content)["settings"].update(values)


def nested(depth):
    content = []
    for _ in range(depth):
        content = [content]
    return content


# Whoever writes other contents can write their digest.
@pytest.mark.parametrize(
    "damage",
    [
        size(10**9),
        size(10**400),
        size(0),
        size(-1),
        size(1.0),
        size(True),
        size("1"),
        config(problem="../../outside"),
        config(optimizer="../../../outside"),
        config(optimizer=".."),
        config(optimizer="/tmp"),
        config(problem="toy\0"),
        config(problem=None),
        config(problem={}),
        config(optimizer="m_sgd"),
        config(learning_rate="0.3"),
        config(learning_rate=math.inf),
        config(learning_rate=10**400),
        config(learning_rate=[0.3]),
        config(seed=10**400),
        config(seed=-1),
        config(seed=1.5),
        config(seed=1),
        config(settings=None),
        config(settings=[]),
        config(description=[]),
        config(description={"deep": nested(300)}),
        config(numerics=1),
        config(unknown=1),
        settings(steps=10**400),
        settings(steps=-20),
        settings(steps="20"),
        settings(batch_size=10**9),
        settings(validation_fraction={}),
        settings(validation_fraction=1e300),
        settings(unknown=1),
        lambda content: content.update(configs={}),
        lambda content: content.update(configs=[[]]),
        lambda content: content.update(configs=None),
        lambda content: content.update(configs="digits"),
        lambda content: content.update(configs=content["configs"] * 2),
        lambda content: content.pop("data"),
        lambda content: content.pop("size"),
        lambda content: content.pop("configs"),
    ],
)
def test_group_that_was_not_written_here_is_named(damage, runs, checkpoint):
    path = checkpoint / "group.json"
    content = read_checked(path)
    damage(content)
    write_checked(path, content)
    with pytest.raises(UserError, match=f"The checkpoint in {checkpoint} cannot be"):
        train(job(runs))
    assert (runs.parent / "outside" / "file").read_text() == "not ours"
    assert set(os.listdir(runs.parent)) == {"outside", "runs"}


def test_group_under_its_own_name_that_leads_outside_is_refused(runs, checkpoint):
    """The directory is called as the digest of its runs demands."""
    content = read_checked(checkpoint / "group.json")
    first_config(content)["problem"] = "../outside"
    write_checked(checkpoint / "group.json", content)
    named = checkpoint.with_name(digest(content["configs"]))
    checkpoint.rename(named)
    assert_named(runs, named, "letters")


@pytest.mark.parametrize("data", [5, None, [], "x" * 100, {"data": nested(300)}])
def test_group_of_other_data_is_refused(data, runs, checkpoint):
    path = checkpoint / "group.json"
    write_checked(path, read_checked(path) | {"data": data})
    with pytest.raises(UserError) as caught:
        train(job(runs))
    assert str(checkpoint) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [0, 2, 10_000])
def test_group_of_another_size_is_named(value, runs, checkpoint):
    path = checkpoint / "group.json"
    write_checked(path, read_checked(path) | {"size": value})
    with pytest.raises(UserError, match=f"The checkpoint in {checkpoint} cannot be"):
        train(job(runs))


def test_measurements_of_other_runs_are_refused(runs, checkpoint):
    """With a digest that is theirs."""
    (path,) = checkpoint.glob(f"checkpoints/20/{MEASURED}")
    measured = json.loads(path.read_text())
    measured.pop("digest")
    measured["evaluations"] *= 2
    measured["digest"] = digest(measured)
    path.write_text(json.dumps(measured))
    assert_named(runs, checkpoint, "not one of these runs")


def test_checkpoint_of_another_optimizer_is_named(runs, checkpoint, monkeypatch):
    # As if its state had changed with a new version of the library.
    other = dataclasses.replace(METHODS["m_sgd"], name="m_svag")
    with monkeypatch.context() as patch:
        patch.setitem(METHODS, "m_svag", other)
        with pytest.raises(UserError, match="its arrays are not those of this opti"):
            train(job(runs))
    assert without_seconds(train(job(runs))) == without_seconds(train(job(None)))


def test_run_that_is_resumed_after_its_last_step_takes_none(runs, monkeypatch):
    monkeypatch.setattr("dissect_optax.dissection._running.advance", pytest.fail)
    record = train(job(runs))
    assert [line.step for line in record.evaluations] == [0, 10, 20]
    assert not list(runs.glob("toy/*/unfinished"))


def test_checkpoint_of_finished_runs_is_cleared_away(runs, checkpoint, monkeypatch):
    """Of a process that died after its last record."""
    with monkeypatch.context() as patch:
        patch.setattr("dissect_optax.dissection._checkpoints.remove", lambda *_: None)
        train(job(runs))
    assert checkpoint.exists()
    train(job(runs), seed=1)
    assert not checkpoint.exists()


def test_half_of_a_first_checkpoint_is_begun_again(runs, checkpoint):
    """Of a process that died before the first one was complete."""
    shutil.rmtree(checkpoint / "checkpoints")
    assert without_seconds(train(job(runs))) == without_seconds(train(job(None)))
