"""Records: whole or absent, found again, and safe from other processes."""

import dataclasses
import json
import math
import os
import shutil
import threading

import jax
import pytest

from dissect_optax.dissection import (
    Measurement,
    Record,
    RunConfig,
    Settings,
    Store,
    UserError,
    digest,
    read_checked,
    to_text,
    write_atomically,
    write_checked,
)

SETTINGS = Settings(steps=20, batch_size=8, evaluation_interval=10)


def made_up_record(learning_rate=0.1, seed=0, settings=SETTINGS, last_loss=1.0):
    config = RunConfig(
        "digits", "m_sgd", learning_rate, seed, settings, {"layers": [8, 3]}
    )
    losses = {step: 2.0 for step in range(0, settings.steps, 10)}
    lines = [
        Measurement(
            step,
            step / 10,
            {"training_loss": loss, "test_loss": 2.125, "test_accuracy": 0.125},
        )
        for step, loss in (losses | {settings.steps: last_loss}).items()
    ]
    return Record(
        config, tuple(lines), {"device": "none", "data": "none"}, {0: {"gain": 0.75}}
    )


def die(*_, **__):
    raise KeyboardInterrupt


def test_record_is_found_as_it_was_written(tmp_path):
    store, record = Store(tmp_path), made_up_record()
    assert store.find(record.config) is None
    store.write(record)
    assert store.find(record.config) == record
    assert store.records("digits", "m_sgd", SETTINGS) == [record]


def changed(line, **values):
    return dataclasses.replace(line, values={**line.values, **values})


@pytest.mark.parametrize("missing", ["test_accuracy", "test_loss"])
def test_measurements_that_lack_the_same_values_are_equal(missing):
    line = made_up_record().evaluations[0]
    # Distinct objects: a tuple equals its copy if both hold the same NaN object.
    first, second = (changed(line, **{missing: float("nan")}) for _ in range(2))
    assert first == second
    assert hash(first) == hash(second)
    assert first != changed(first, training_loss=math.nan)
    assert first != changed(first, **{missing: 0.5})
    assert first != made_up_record().config


def test_value_that_is_not_finite_is_null(tmp_path):
    store, record = Store(tmp_path), made_up_record(last_loss=math.inf)
    store.write(record)
    text = store.path(record.config).read_text()
    lines = json.loads(text, parse_constant=pytest.fail)["evaluations"]
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
    longer = dataclasses.replace(SETTINGS, steps=40)
    record = made_up_record()
    other_settings = (
        dataclasses.replace(SETTINGS, **change)
        for change in (
            {"batch_size": 16},
            {"validation_fraction": 0.1},
            {"examples": 100},
        )
    )
    other_configs = (
        dataclasses.replace(record.config, **change)
        for change in (
            {"description": {"layers": [8, 4]}},
            {"numerics": {**record.config.numerics, "x64": True}},
            {"numerics": {**record.config.numerics, "matmul_precision": "highest"}},
        )
    )
    records = [
        record,
        made_up_record(learning_rate=0.3),
        made_up_record(seed=1),
        made_up_record(settings=longer),
        *(made_up_record(settings=settings) for settings in other_settings),
        *(dataclasses.replace(record, config=config) for config in other_configs),
    ]
    store = Store(tmp_path)
    for run in records:
        store.write(run)
    assert len({store.path(run.config) for run in records}) == len(records)
    assert [store.find(run.config) for run in records] == records
    assert store.records("digits", "m_sgd", longer) == [records[3]]
    # Of other numerics they are other runs.
    found = store.records("digits", "m_sgd", SETTINGS)
    assert all(run.config.numerics == record.config.numerics for run in found)
    assert len(found) == 4


def test_a_precision_of_its_own_is_another_run(tmp_path):
    store, record = Store(tmp_path), made_up_record()
    store.write(record)
    with jax.default_matmul_precision("float32"):
        assert store.records("digits", "m_sgd", SETTINGS) == []
        assert store.find(made_up_record().config) is None
    assert store.records("digits", "m_sgd", SETTINGS) == [record]


@pytest.mark.usefixtures("x64")
def test_double_precision_is_another_run():
    assert made_up_record().config.numerics["x64"]


@pytest.mark.parametrize(
    "description",
    [{"layers": (8, 3)}, {3: "three"}, {"layers": [8, (3, math.nan)], "name": None}],
)
def test_configuration_is_what_its_file_will_say(description, tmp_path):
    config = dataclasses.replace(made_up_record().config, description=description)
    record = dataclasses.replace(made_up_record(), config=config)
    store = Store(tmp_path)
    store.write(record)
    assert store.find(config) == record
    assert store.find(config).config == config


def test_finished_record_is_not_replaced(tmp_path):
    store, record = Store(tmp_path), made_up_record()
    store.write(record)
    store.write(made_up_record(last_loss=0.5))
    assert store.find(record.config) == record
    assert len(os.listdir(store.path(record.config).parent)) == 1


def write_and_die(store, record, monkeypatch):
    """As if killed when all is written and nothing is in its place yet."""
    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.replace", die)
        patch.setattr("pathlib.Path.unlink", die)
        with pytest.raises(KeyboardInterrupt):
            store.write(record)


def test_draft_of_a_killed_process_is_no_record(tmp_path, monkeypatch):
    store, record = Store(tmp_path), made_up_record()
    write_and_die(store, record, monkeypatch)
    assert store.find(record.config) is None
    assert store.records("digits", "m_sgd", SETTINGS) == []
    store.write(record)
    assert store.find(record.config) == record


def shortened(content):
    content["evaluations"].pop()


def first_only(content):
    del content["evaluations"][1:]


def emptied(content):
    content["evaluations"] = []


def begun_late(content):
    del content["evaluations"][0]


def without_test_loss(content):
    del content["evaluations"][1]["test_loss"]


def without_training_loss(content):
    for line in content["evaluations"]:
        del line["training_loss"]


def put(value, *path):
    """Puts a value in the place of another one."""

    def damage(content):
        for key in path[:-1]:
            content = content[key]
        content[path[-1]] = value

    return damage


def remove(name):
    return lambda content: content.pop(name)


def assert_named(store, record, reason):
    path = store.path(record.config)
    with pytest.raises(UserError, match=f"{path} cannot be read.*{reason}.*remove"):
        store.find(record.config)
    with pytest.raises(UserError, match="cannot be read"):
        store.records("digits", "m_sgd", SETTINGS)


@pytest.mark.parametrize(
    "edit",
    [
        ('"test_accuracy": 0.125', '"test_accuracy": 0.25'),
        ('"training_loss": 2.0', '"training_loss": null'),
        ('"seconds": 1.0', '"seconds": 2.0'),
        ('"device": "none"', '"device": "some"'),
        ('"data": "none"', '"data": "some"'),
        ('"gain": 0.75', '"gain": 0.5'),
        ('"layers": [8, 3]', '"layers": [8, 4]'),
        ('"digest": "', '"digest": "0'),
    ],
)
def test_any_edit_of_a_record_is_an_error(tmp_path, edit):
    store, record = Store(tmp_path), made_up_record()
    store.write(record)
    path = store.path(record.config)
    text = path.read_text()
    assert edit[0] in text
    path.write_text(text.replace(*edit, 1))
    assert_named(store, record, "digest")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "Expecting value"),
        ("5", "JSON object"),
        ("null", "JSON object"),
        ('"text"', "JSON object"),
        ("[]", "JSON object"),
        ("{}", "digest"),
        ('{"digest": null}', "digest"),
        ("[" * 100_000, "nested"),
        ('{"config":' * 100_000, "nested"),
        ("9" * 10_000, "digits"),
        ("\0", "Expecting value"),
    ],
)
def test_anything_else_in_place_of_a_record_is_named(tmp_path, text, reason):
    store, record = Store(tmp_path), made_up_record()
    store.write(record)
    store.path(record.config).write_text(text)
    assert_named(store, record, reason)


def test_half_of_a_record_and_other_bytes_are_named(tmp_path):
    store, record = Store(tmp_path), made_up_record()
    store.write(record)
    path = store.path(record.config)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    assert_named(store, record, "char")
    path.write_bytes(b"\xff" + content)
    assert_named(store, record, "decode")


# Whoever writes other contents can write their digest.
@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (emptied, "not those of its configuration"),
        # Lines that are whole, but not all of them.
        (first_only, "after step 0 of 20"),
        (shortened, "after step 10 of 20"),
        (begun_late, "not those of its configuration"),
        (without_test_loss, "the same quantities"),
        (without_training_loss, "the same quantities"),
        (put("x", "evaluations", 0, "training_loss"), "training_loss must be a number"),
        (put(True, "evaluations", 0, "test_loss"), "test_loss must be a number"),
        (put([], "evaluations", 1, "test_loss"), "test_loss must be a number"),
        (put(10**400, "evaluations", 1, "training_loss"), "too large"),
        (put(10.5, "evaluations", 1, "step"), "step must be an integer"),
        (put(None, "evaluations", 1, "step"), "step must be an integer"),
        (put(5, "evaluations", 0), "int"),
        (put(5, "evaluations"), "int"),
        (put({}, "evaluations"), "not those of its configuration"),
        (put([], "diagnostics"), "list"),
        (put({"x": {}}, "diagnostics"), "invalid literal"),
        (put(None, "environment"), "NoneType"),
        (put(10, "config", "settings", "steps"), "not those of"),
        (put(0, "config", "settings", "evaluation_interval"), "must be at least 1"),
        (put(7, "config", "settings", "evaluation_interval"), "must divide"),
        (put(10**30, "config", "settings", "steps"), "too large"),
        (put("20", "config", "settings", "steps"), "must be an integer"),
        (put(None, "config", "settings", "validation_fraction"), "not supported"),
        (put(1, "config", "settings", "unknown"), "unexpected keyword"),
        (put(None, "config", "settings"), "mapping"),
        (put(0.2, "config", "learning_rate"), "another file"),
        (put("x", "config", "learning_rate"), "Expected a number"),
        (put(math.inf, "config", "learning_rate"), "number"),
        (put(-1, "config", "seed"), "must lie in"),
        (put(1.0, "config", "seed"), "an integer as"),
        (put("../../elsewhere", "config", "problem"), "must consist of letters"),
        (put(["digits"], "config", "problem"), "expected string"),
        (put(5, "config", "description"), "description"),
        (put([], "config", "numerics"), "numerics"),
        (remove("config"), "config"),
        (remove("environment"), "environment"),
        (remove("evaluations"), "evaluations"),
        (remove("diagnostics"), "diagnostics"),
    ],
)
def test_damaged_record_is_named(tmp_path, damage, reason):
    store, record = Store(tmp_path), made_up_record()
    store.write(record)
    path = store.path(record.config)
    content = read_checked(path)
    damage(content)
    write_checked(path, content)
    assert_named(store, record, reason)


def test_huge_file_is_not_read(tmp_path):
    store, record = Store(tmp_path), made_up_record()
    store.write(record)
    os.truncate(store.path(record.config), 10**9)
    assert_named(store, record, "too large")


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"problem": "../digits"}, ValueError),
        ({"problem": ""}, ValueError),
        ({"optimizer": "a/b"}, ValueError),
        ({"optimizer": ".."}, ValueError),
        ({"optimizer": "x" * 300}, ValueError),
        ({"learning_rate": 0.0}, ValueError),
        ({"learning_rate": math.nan}, ValueError),
        ({"learning_rate": 1}, TypeError),
        ({"seed": 2**32}, ValueError),
        ({"seed": True}, TypeError),
        ({"description": {"network": object()}}, TypeError),
        ({"description": "a network"}, TypeError),
    ],
)
def test_configuration_that_no_file_can_hold_is_refused(change, error):
    with pytest.raises(error, match=next(iter(change))):
        dataclasses.replace(made_up_record().config, **change)


def test_digest_changes_with_any_entry():
    content = {"config": {"seed": 1}, "values": [1.0, None]}
    others = [
        {"config": {"seed": 2}, "values": [1.0, None]},
        {"config": {"seed": 1}, "values": [1.0]},
        {"config": {"seed": 1}, "values": [1.0, 0.0]},
    ]
    assert digest(content) == digest(dict(reversed(content.items())))
    assert len({digest(content), *map(digest, others)}) == 4


def test_remains_of_a_killed_process_are_cleared_away(tmp_path, monkeypatch):
    store = Store(tmp_path)
    write_and_die(store, made_up_record(), monkeypatch)
    folder = store.folder("digits", "m_sgd")
    assert list(folder.glob(".rate*"))
    with store.lock("digits", "m_sgd", print):
        assert not list(folder.glob(".rate*"))


def test_copy_of_a_record_is_no_second_one(tmp_path):
    store, record = Store(tmp_path), made_up_record()
    store.write(record)
    path = store.path(record.config)
    shutil.copy(path, path.with_name(f"{path.stem} (copy).json"))
    with pytest.raises(UserError, match="another file"):
        store.records("digits", "m_sgd", SETTINGS)


def test_run_that_diverged_is_finished(tmp_path):
    store, record = Store(tmp_path), made_up_record(last_loss=math.nan)
    early = dataclasses.replace(
        record,
        evaluations=(
            record.evaluations[0],
            changed(record.evaluations[1], training_loss=math.nan),
        ),
    )
    store.write(early)
    found = store.find(record.config)
    assert found.diverged
    assert found == early


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


def test_records_in_memory_are_those_on_disk_and_nothing_is_written(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    store, on_disk = Store(None), Store(tmp_path / "runs")
    records = [made_up_record(seed=seed) for seed in (1, 0)]
    assert store.find(records[0].config) is None
    with store.lock("digits", "m_sgd", pytest.fail):
        for record in records:
            store.write(record)
            store.write(dataclasses.replace(record, evaluations=()))  # Is not replaced.
    assert not list(tmp_path.iterdir())
    for record in records:
        on_disk.write(record)
    for some in (store, on_disk):
        assert [some.find(record.config) for record in records] == records
        assert some.records("digits", "m_sgd", SETTINGS) == records[::-1]
        assert some.records("digits", "adam", SETTINGS) == []
        assert some.records("mnist", "m_sgd", SETTINGS) == []
        assert some.optimizers("digits") == ["m_sgd"]
        assert some.optimizers("mnist") == []
    with pytest.raises(ValueError, match="in memory have no directory"):
        store.path(records[0].config)
