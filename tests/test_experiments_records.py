"""Records: whole or absent, found again, and safe from other processes."""

import json
import math
import os
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
    lines = (
        Measurement(0, 2.0, 1.9, 2.1, 2.0, 0.1, learning_rate, 0.5),
        Measurement(10, last_loss, 0.9, 1.1, 1.0, 0.8, learning_rate, 1.5),
    )
    return Record(config, lines, {"device": "none"})


def die(*_):
    raise KeyboardInterrupt


def test_record_is_found_as_it_was_written(tmp_path):
    store, record = Store(tmp_path), made_up_record()
    assert store.find(record.config) is None
    store.write(record)
    assert store.find(record.config) == record
    assert store.records("digits", "m_sgd", SETTINGS) == [record]


def test_value_that_is_not_finite_is_null(tmp_path):
    store, record = Store(tmp_path), made_up_record(last_loss=math.inf)
    store.write(record)
    text = (store.directory(record.config) / "evaluations.jsonl").read_text()
    lines = [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]
    assert [line["training_loss"] for line in lines] == [2.0, None]
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


def test_draft_of_a_killed_process_is_no_record(tmp_path, monkeypatch):
    store, record = Store(tmp_path), made_up_record()
    with monkeypatch.context() as patch:
        # As if killed when all is written and nothing is in its place yet.
        patch.setattr("pathlib.Path.rename", die)
        with pytest.raises(KeyboardInterrupt):
            store.write(record)
    assert store.find(record.config) is None
    assert store.records("digits", "m_sgd", SETTINGS) == []
    store.write(record)
    assert store.find(record.config) == record


def test_damaged_record_is_named(tmp_path):
    store, record = Store(tmp_path), made_up_record()
    store.write(record)
    directory = store.directory(record.config)
    (directory / "evaluations.jsonl").write_text('{"step": 0, "trai')
    with pytest.raises(UserError, match=f"{directory} cannot be read.*remove"):
        store.find(record.config)


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
