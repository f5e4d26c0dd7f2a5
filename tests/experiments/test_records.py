"""Records: whole or absent, found again, and safe from other processes."""

import dataclasses
import json
import math
import os
import shutil
import threading

import pytest

from experiments.errors import UserError
from experiments.problems import Settings
from experiments.records import (
    Measurement,
    Record,
    RunConfig,
    Store,
    to_text,
    write_atomically,
)

SETTINGS = Settings(steps=20, batch_size=8, l2=0.1, evaluation_interval=10)


def made_up_record(learning_rate=0.1, seed=0, settings=SETTINGS, last_loss=1.0):
    config = RunConfig("digits", "none", "m_sgd", learning_rate, seed, settings)
    losses = {step: 2.0 for step in range(0, settings.steps, 10)}
    lines = [
        Measurement(step, loss, 1.9, 2.1, 2.0, 0.1, learning_rate, step / 10)
        for step, loss in (losses | {settings.steps: last_loss}).items()
    ]
    return Record(config, tuple(lines), {"device": "none"})


def first_lines(text, count):
    return "".join(text.splitlines(keepends=True)[:count])


def die(*_):
    raise KeyboardInterrupt


def test_record_is_found_as_it_was_written(tmp_path):
    store, record = Store(tmp_path), made_up_record()
    assert store.find(record.config) is None
    store.write(record)
    assert store.find(record.config) == record
    assert store.records("digits", "m_sgd", SETTINGS) == [record]


@pytest.mark.parametrize("missing", ["validation_loss", "test_loss"])
def test_measurements_that_lack_the_same_values_are_equal(missing):
    line = made_up_record().evaluations[0]
    # Distinct objects: a tuple equals its copy if both hold the same NaN object.
    first, second = (
        dataclasses.replace(line, **{missing: float("nan")}) for _ in range(2)
    )
    assert first == second
    assert hash(first) == hash(second)
    assert first != dataclasses.replace(first, training_loss=math.nan)
    assert first != dataclasses.replace(first, **{missing: 0.5})
    assert first != made_up_record().config


def test_value_that_is_not_finite_is_null(tmp_path):
    store, record = Store(tmp_path), made_up_record(last_loss=math.inf)
    store.write(record)
    text = (store.directory(record.config) / "evaluations.jsonl").read_text()
    lines = [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]
    assert [line["training_loss"] for line in lines] == [2.0, 2.0, None]
    found = store.find(record.config)
    assert found is not None
    assert found.diverged
    assert not made_up_record().diverged


def test_numbers_that_are_not_finite_are_null_at_any_depth():
    content = {"std": math.nan, "all": [1.0, (math.inf, "NaN")], "count": 2}
    text = to_text(content)
    assert json.loads(text, parse_constant=pytest.fail) == {
        "std": None,
        "all": [1.0, [None, "NaN"]],
        "count": 2,
    }


def test_every_setting_makes_another_record(tmp_path):
    longer = Settings(steps=40, batch_size=8, l2=0.1, evaluation_interval=10)
    records = [
        made_up_record(),
        made_up_record(learning_rate=0.3),
        made_up_record(seed=1),
        made_up_record(settings=longer),
    ]
    store = Store(tmp_path)
    for record in records:
        store.write(record)
    assert len({store.directory(record.config) for record in records}) == 4
    assert store.records("digits", "m_sgd", longer) == [records[3]]


def test_finished_record_is_not_replaced(tmp_path):
    store, record = Store(tmp_path), made_up_record()
    store.write(record)
    store.write(made_up_record(last_loss=0.5))
    assert store.find(record.config) == record
    assert len(os.listdir(store.directory(record.config).parent)) == 1


def write_and_die(store, record, monkeypatch):
    """As if killed when all is written and nothing is in its place yet."""
    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.rename", die)
        with pytest.raises(KeyboardInterrupt):
            store.write(record)


def test_draft_of_a_killed_process_is_no_record(tmp_path, monkeypatch):
    store, record = Store(tmp_path), made_up_record()
    write_and_die(store, record, monkeypatch)
    assert store.find(record.config) is None
    assert store.records("digits", "m_sgd", SETTINGS) == []
    store.write(record)
    assert store.find(record.config) == record


@pytest.mark.parametrize(
    ("file", "damage", "reason"),
    [
        ("evaluations.jsonl", lambda text: text[: len(text) // 2], "char"),
        ("evaluations.jsonl", lambda text: "", "not those of config.json"),
        ("evaluations.jsonl", lambda text: "5\n", "int"),
        # Lines that are whole, but not all of them.
        ("evaluations.jsonl", lambda text: first_lines(text, 1), "after step 0 of 20"),
        ("evaluations.jsonl", lambda text: text.replace("0.1", '"x"', 1), "a number"),
        (
            "evaluations.jsonl",
            lambda text: text.replace('"test_accuracy": 0.1', '"test_accuracy": null'),
            "no test accuracy after step 0",
        ),
        ("evaluations.jsonl", lambda text: first_lines(text, 2), "after step 10 of 20"),
        (
            "evaluations.jsonl",
            lambda text: text[text.index("\n") + 1 :],
            "not those of",
        ),
        ("config.json", lambda text: text.replace("20", "10"), "not those of"),
        (
            "config.json",
            lambda text: text.replace("0.1", "0.2", 1),
            "another directory",
        ),
        ("config.json", lambda text: text.replace(": 10", ": 0"), "must divide"),
        ("config.json", lambda text: text.replace("0.1", '"x"', 1), "code 'g'"),
        ("environment.json", lambda text: "", "Expecting value"),
    ],
)
def test_damaged_record_is_named(tmp_path, file, damage, reason):
    store, record = Store(tmp_path), made_up_record()
    store.write(record)
    directory = store.directory(record.config)
    text = (directory / file).read_text()
    assert damage(text) != text
    (directory / file).write_text(damage(text))
    with pytest.raises(
        UserError, match=f"{directory} cannot be read.*{reason}.*remove"
    ):
        store.find(record.config)
    with pytest.raises(UserError, match="cannot be read"):
        store.records("digits", "m_sgd", SETTINGS)


def test_remains_of_a_killed_process_are_cleared_away(tmp_path, monkeypatch):
    store = Store(tmp_path)
    write_and_die(store, made_up_record(), monkeypatch)
    folder = store.folder("digits", "m_sgd")
    assert list(folder.glob(".draft-*"))
    with store.lock("digits", "m_sgd", print):
        assert not list(folder.glob(".draft-*"))


def test_copy_of_a_record_is_no_second_one(tmp_path):
    store, record = Store(tmp_path), made_up_record()
    store.write(record)
    directory = store.directory(record.config)
    shutil.copytree(directory, directory.with_name(directory.name + " (copy)"))
    with pytest.raises(UserError, match="another directory"):
        store.records("digits", "m_sgd", SETTINGS)


def test_run_that_diverged_is_finished(tmp_path):
    store, record = Store(tmp_path), made_up_record(last_loss=math.nan)
    early = dataclasses.replace(
        record,
        evaluations=(
            record.evaluations[0],
            dataclasses.replace(record.evaluations[1], training_loss=math.nan),
        ),
    )
    store.write(early)
    assert store.find(record.config).diverged


def test_atomic_file_is_replaced_whole(tmp_path):
    path = tmp_path / "new" / "summary.json"
    write_atomically(path, "one")
    write_atomically(path, "two")
    assert path.read_text() == "two"
    assert os.listdir(path.parent) == ["summary.json"]


def test_second_process_waits_for_the_first(tmp_path):
    store, events = Store(tmp_path), []

    def second():
        with store.lock("digits", "adam", lambda _: waiting.set()):
            events.append("second")

    waiting = threading.Event()
    with store.lock("digits", "adam", pytest.fail):
        # Another method is another lock.
        with store.lock("digits", "m_sgd", pytest.fail):
            pass
        thread = threading.Thread(target=second)
        thread.start()
        assert waiting.wait(timeout=30)
        events.append("first")
    thread.join(timeout=30)
    assert events == ["first", "second"]
