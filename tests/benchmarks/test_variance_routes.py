import json

from benchmarks.variance_models import CASES
from benchmarks.variance_routes import RECORD, changes


def test_changed_new_and_lost_routes_are_reported():
    before = {"same": {"w": "a"}, "changed": {"w": "a", "b": "c"}, "lost": {"": "a"}}
    now = {"same": {"w": "a"}, "changed": {"w": "b", "b": "c"}, "new": {"": "d"}}
    assert changes(before, now) == [
        "changed w: a -> b",
        "lost : a -> none",
        "new : none -> d",
    ]


def test_the_record_has_every_case_and_its_versions():
    record = json.loads(RECORD.read_text())
    assert record["routes"].keys() == CASES.keys()
    assert record["environment"].keys() >= {"jax", "python", "date"}
