import dataclasses
import json
from dataclasses import dataclass, field

import pytest

from optimum_fista.options import as_record


@dataclass(frozen=True)
class Inner:
    share: float
    places: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Outer:
    name: str
    pairs: list[tuple[int, float]] = field(default_factory=list)
    by_size: dict[int, Inner] = field(default_factory=dict)
    one: Inner | None = None


@pytest.mark.parametrize(
    "record",
    [
        Outer("a"),
        Outer("b", [(1, 0.5), (2, 1)], {16: Inner(0.5, (1, 2)), 32: Inner(1, ())}, Inner(2.0)),
    ],
)
def test_a_record_is_the_same_after_writing_and_reading_json(record):
    assert as_record(Outer, json.loads(json.dumps(dataclasses.asdict(record)))) == record


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "'name'"),
        ({"name": "a", "nane": "b"}, "'nane'"),
        ({"name": 1}, "name=1: pass text"),
        ({"name": "a", "one": {"share": "half"}}, "share='half': pass a number"),
        ({"name": "a", "one": {"share": 0.5, "places": [1.5]}}, "places="),
        ({"name": "a", "pairs": [[1]]}, "pairs="),
    ],
)
def test_values_that_make_no_such_record_are_refused(values, message):
    with pytest.raises(TypeError, match=message):
        as_record(Outer, values)
