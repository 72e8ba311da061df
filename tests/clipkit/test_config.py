from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipkit.config import differences, from_json, set_values, to_json
from clipkit.errors import UserError


@dataclass(frozen=True)
class Inner:
    rate: float = 0.5
    kind: Literal["a", "b"] = "a"
    span: tuple[float, float] = (0.0, 1.0)


@dataclass(frozen=True)
class Outer:
    count: int = 1
    limit: int | None = None
    flag: bool = False
    word: str = ""
    inner: Inner = field(default_factory=Inner)
    parts: tuple[Inner, ...] = (Inner(), Inner())
    weights: Mapping[str, float] = field(default_factory=lambda: {"a": 1.0})


@pytest.mark.parametrize(
    ("assignment", "read", "value"),
    [
        ("count=7", lambda c: c.count, 7),
        ("count=1_000", lambda c: c.count, 1000),
        ("count=12.8M", lambda c: c.count, 12_800_000),
        ("count=1.001M", lambda c: c.count, 1_001_000),
        ("count=1e6", lambda c: c.count, 1_000_000),
        ("count=9007199254740993", lambda c: c.count, 9007199254740993),
        ("limit=2K", lambda c: c.limit, 2000),
        ("limit=none", lambda c: c.limit, None),
        ("flag=true", lambda c: c.flag, True),
        ("word=a=b", lambda c: c.word, "a=b"),
        ("inner.rate=1e-3", lambda c: c.inner.rate, 1e-3),
        ("inner.kind=b", lambda c: c.inner.kind, "b"),
        ("inner.span=0.4, 1", lambda c: c.inner.span, (0.4, 1.0)),
        ("weights.b=2", lambda c: dict(c.weights), {"a": 1.0, "b": 2.0}),
        ("parts.1.rate=2", lambda c: (c.parts[0].rate, c.parts[1].rate), (0.5, 2.0)),
    ],
)
def test_a_value_is_parsed_by_the_type_of_its_field(assignment, read, value):
    found = read(set_values(Outer(), [assignment]))
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("assignment", "says"),
    [
        ("coumt=1", "did you mean count"),
        ("count", "key=value"),
        ("count=1.5", "whole number"),
        ("count=many", "whole number"),
        ("count=inf", "whole number"),
        ("flag=maybe", "true or false"),
        ("inner.kind=c", "choose from a, b"),
        ("inner.span=1", "2 values"),
        ("inner=3", "inner.FIELD"),
        ("count.x=3", "plain value"),
        ("parts.2.rate=3", "0 to 1"),
        ("parts.x.rate=3", "isn't an index"),
        ("inner.rate=fast", "a number"),
        ("weights.b=fast", "a number"),
        ("weights.b.c=1", "goes too deep"),
        ("weights=1", "weights.FIELD"),
    ],
)
def test_a_wrong_setting_says_in_one_line_what_would_do(assignment, says):
    with pytest.raises(UserError, match=says) as error:
        set_values(Outer(), [assignment])
    assert "\n" not in str(error.value)


@given(
    st.builds(
        Outer,
        count=st.integers(),
        limit=st.none() | st.integers(),
        flag=st.booleans(),
        word=st.text(),
        inner=st.builds(Inner, rate=st.floats(allow_nan=False), kind=st.sampled_from(["a", "b"])),
        parts=st.lists(st.builds(Inner), max_size=3).map(tuple),
    )
)
def test_json_gives_back_the_same_configuration(config):
    assert from_json(Outer, to_json(config)) == config


def test_a_field_of_a_newer_version_is_refused():
    with pytest.raises(UserError, match="'novel'"):
        from_json(Outer, {"novel": 1})


def test_differences_name_the_path():
    ours, theirs = to_json(Outer()), to_json(set_values(Outer(), ["parts.1.rate=3", "word=x"]))
    assert differences(ours, theirs) == ["parts.1.rate: 0.5 -> 3.0", "word:  -> x"]
