"""X-Robots-Tag in the spellings that the web uses, and what each means for us."""

from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipkit.tfrecord_tools.web.permissions import PLAIN, Decision, Tag, decide, parse_date, parse_tags
from clipkit.tfrecord_tools.web.settings import DISALLOWED_TAGS


def judge(*headers: str, tdm: str | None = None, **changes: Any) -> Decision:
    settings = {"token": "clipkit", "disallowed": DISALLOWED_TAGS, "tdm_reservation": True, **changes}
    return decide(headers, tdm, **settings)


@pytest.mark.parametrize(
    ("header", "tags"),
    [
        ("noindex", [Tag("", "noindex")]),
        ("NoIndex ,  NOAI", [Tag("", "noindex"), Tag("", "noai")]),
        ("otherbot: noindex, noai", [Tag("otherbot", "noindex"), Tag("otherbot", "noai")]),
        ("noai, otherbot: noindex", [Tag("", "noai"), Tag("otherbot", "noindex")]),
        ("a: noai, b: noml, none", [Tag("a", "noai"), Tag("b", "noml"), Tag("b", "none")]),
        ("BadBot: none, *: noml", [Tag("badbot", "none"), Tag("", "noml")]),
        ("max-snippet: 20, noai", [Tag("", "max-snippet", "20"), Tag("", "noai")]),
        ("bot: max-snippet: 0, noai", [Tag("bot", "max-snippet", "0"), Tag("bot", "noai")]),
        ("unavailable_after: 25 Jun 2030 15:00:00 PST", [Tag("", "unavailable_after", "25 Jun 2030 15:00:00 PST")]),
        (
            "unavailable_after: Tue, 25 Jun 2030 15:00:00 GMT, noai",
            [Tag("", "unavailable_after", "Tue, 25 Jun 2030 15:00:00 GMT"), Tag("", "noai")],
        ),
        (
            "clipkit: unavailable_after: Tuesday, 25-Jun-30 15:00:00 UTC, otherbot: none",
            [Tag("clipkit", "unavailable_after", "Tuesday, 25-Jun-30 15:00:00 UTC"), Tag("otherbot", "none")],
        ),
        ("unavailable_after: 2030-06-25T15:00:00+02:00", [Tag("", "unavailable_after", "2030-06-25T15:00:00+02:00")]),
        ("", []),
        (" , ,", []),
        ("bot:", []),
        ("something new", [Tag("", "something new")]),
        ("noai: 1", [Tag("", "noai")]),
    ],
)  # fmt: skip
def test_parse(header: str, tags: list[Tag]) -> None:
    assert parse_tags(header) == tags


DIRECTIVES = st.sampled_from(sorted(PLAIN))
AGENTS = st.from_regex(r"[a-z][a-z0-9_-]{0,10}bot", fullmatch=True)
DATES = st.datetimes(datetime(2001, 1, 1), datetime(2090, 1, 1)).map(
    lambda date: date.replace(microsecond=0, tzinfo=UTC)
)
DATE_FORMATS = st.sampled_from(
    [
        lambda date: format_datetime(date, usegmt=True),
        lambda date: date.strftime("%d %b %Y %H:%M:%S GMT"),
        lambda date: date.strftime("%A, %d %b %Y %H:%M:%S +0000"),
        lambda date: date.isoformat(),
    ]
)


@st.composite
def headers(draw: st.DrawFn) -> tuple[str, list[Tag]]:
    """A header in a random spelling, and what it says."""
    groups = draw(st.lists(st.tuples(AGENTS, st.integers(1, 3)), max_size=4))
    if draw(st.booleans()):
        groups.insert(0, ("", draw(st.integers(1, 3))))
    pieces, tags = [], []
    for agent, count in groups:
        for number in range(count):
            if draw(st.integers(0, 3)) == 0:
                value = draw(DATE_FORMATS)(draw(DATES))
                tag, text = (
                    Tag(agent, "unavailable_after", value),
                    f"Unavailable_After:{draw(st.sampled_from(['', ' ']))}{value}",
                )
            else:
                directive = draw(DIRECTIVES)
                tag, text = Tag(agent, directive), draw(st.sampled_from([directive, directive.upper()]))
            tags.append(tag)
            pieces.append(f"{agent.capitalize()}: {text}" if agent and number == 0 else text)
    return draw(st.sampled_from([", ", ",", " , "])).join(pieces), tags


@given(headers())
def test_parse_undoes_any_spelling(case: tuple[str, list[Tag]]) -> None:
    header, tags = case
    parsed = parse_tags(header)
    assert [(tag.agent, tag.directive, tag.value.replace(" ", "")) for tag in parsed] == [
        (tag.agent, tag.directive, tag.value.replace(" ", "")) for tag in tags
    ]


@given(headers(), AGENTS)
def test_what_is_said_to_others_is_nothing_to_us(case: tuple[str, list[Tag]], token: str) -> None:
    header, tags = case
    now = datetime.now(UTC)
    ours = [tag for tag in tags if tag.agent in ("", token)]
    expected = any(
        (tag.directive in DISALLOWED_TAGS and tag.directive != "unavailable_after")
        or (tag.directive == "unavailable_after" and parse_date(tag.value) <= now)
        for tag in ours
    )
    decision = judge(header, token=token.upper())
    assert decision.refused == expected
    assert bool(decision.said) == bool(ours)


@given(st.text(max_size=100))
def test_no_header_breaks_it(header: str) -> None:
    judge(header, tdm=header)


@given(DATES, DATE_FORMATS)
def test_dates(date: datetime, write: Any) -> None:
    assert parse_date(write(date)) == date


@pytest.mark.parametrize(
    ("text", "date"),
    [
        ("25 Jun 2030 15:00:00 PST", datetime(2030, 6, 25, 23, tzinfo=UTC)),
        ("Wednesday, 25-Jun-30 15:00:00 UTC", datetime(2030, 6, 25, 15, tzinfo=UTC)),
        ("2030-06-25", datetime(2030, 6, 25, tzinfo=UTC)),
        ("soon", None),
        ("", None),
        ("99 Jun 2030 15:00:00", None),
    ],
)
def test_odd_dates(text: str, date: datetime | None) -> None:
    assert parse_date(text) == date


def test_unavailable_after_counts_once_it_is_past() -> None:
    now = datetime.now(UTC)
    past, future = (format_datetime(now + timedelta(days=days)) for days in (-1, 1))
    assert judge(f"unavailable_after: {past}").refused
    assert not judge(f"unavailable_after: {future}").refused
    assert not judge("unavailable_after: some day").refused


def test_agents() -> None:
    assert judge("clipkit: noai").refused
    assert judge("ClipKit/0.1: noai").refused
    assert judge("*: noai").refused
    assert not judge("clipkitten: noai").refused
    assert judge("otherbot: noai", "noml") == Decision("x-robots-tag: noml", refused=True)
    assert judge("index, clipkit: none").said == "x-robots-tag: index; x-robots-tag: clipkit: none"


@pytest.mark.parametrize("directive", ["noai", "noimageai", "noml", "noindex", "noimageindex", "none"])
def test_each_directive_keeps_us_out_unless_it_is_not_to(directive: str) -> None:
    assert judge(directive) == Decision(f"x-robots-tag: {directive}", refused=True)
    assert judge(directive, disallowed=()) == Decision(f"x-robots-tag: {directive}", refused=False)


def test_tdm_reservation() -> None:
    assert judge(tdm=" 1 ") == Decision("tdm-reservation: 1", refused=True)
    assert judge(tdm="0") == Decision("tdm-reservation: 0", refused=False)
    assert judge(tdm="1", tdm_reservation=False) == Decision("tdm-reservation: 1", refused=False)
    assert judge() == Decision("", refused=False)
    assert len(judge(*["noarchive"] * 100).said) <= 300
