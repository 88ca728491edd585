"""Joins: parts of requests are put together once, and none is kept for ever."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from blockflow.joining import Joins, Verdict

AB = ("a", "b")


def test_a_request_is_complete_when_all_sources_have_sent_their_part() -> None:
    joins: Joins[int, str, str] = Joins(8)
    assert joins.add(1, AB, "b", "b1", 0.0) is Verdict.WAITING
    assert joins.add(2, AB, "a", "a2", 0.0) is Verdict.WAITING
    assert joins.waiting == 2
    assert joins.add(1, AB, "a", "a1", 0.0) == {"a": "a1", "b": "b1"}
    assert joins.add(2, AB, "b", "b2", 0.0) == {"a": "a2", "b": "b2"}
    assert joins.waiting == 0
    assert not list(joins)


def test_what_failed_in_one_branch_gives_its_other_parts_back_now_or_when_they_come() -> None:
    joins: Joins[int, str, str] = Joins(8)
    joins.add(1, AB, "b", "b1", 0.0)
    assert joins.lose(1, AB, "a", 0.0) == (True, ("b1",))
    assert joins.lose(2, AB, "a", 0.0) == (True, ())
    assert joins.add(2, AB, "b", "b2", 0.0) is Verdict.LOST
    assert not list(joins)


def test_a_request_that_failed_in_both_branches_is_news_once() -> None:
    joins: Joins[int, str, str] = Joins(8)
    assert joins.lose(1, AB, "a", 0.0) == (True, ())
    assert joins.lose(1, AB, "b", 0.0) == (False, ())
    assert not list(joins)


def test_a_part_that_stays_alone_is_given_up_at_its_deadline_and_forgotten_later() -> None:
    joins: Joins[int, str, str] = Joins(8)
    joins.add(1, AB, "a", "a1", 10.0)
    assert list(joins.expire(10.0)) == []
    assert list(joins.expire(10.5)) == [(1, ("a1",))]
    assert list(joins.expire(11.0)) == []
    assert joins.waiting == 0
    assert list(joins) == [1]
    assert list(joins.expire(1000.0)) == []
    assert not list(joins)


def test_a_late_part_of_what_was_given_up_is_not_needed() -> None:
    joins: Joins[int, str, str] = Joins(8)
    joins.add(1, AB, "a", "a1", 10.0)
    list(joins.expire(11.0))
    assert joins.add(1, AB, "b", "b1", 10.0) is Verdict.LOST
    assert not list(joins)


def test_no_more_wait_than_are_allowed_and_a_refused_one_is_refused_altogether() -> None:
    joins: Joins[int, str, str] = Joins(2)
    for key in (1, 2):
        joins.add(key, AB, "a", f"a{key}", 0.0)
    assert joins.add(3, AB, "a", "a3", 0.0) is Verdict.REFUSED
    assert joins.add(3, AB, "b", "b3", 0.0) is Verdict.LOST
    assert joins.add(1, AB, "b", "b1", 0.0) == {"a": "a1", "b": "b1"}
    assert joins.add(3, AB, "a", "a3", 0.0) is Verdict.WAITING


def test_forgetting_gives_every_part_back() -> None:
    joins: Joins[int, str, str] = Joins(8)
    joins.add(1, AB, "a", "a1", 0.0)
    joins.lose(2, AB, "a", 0.0)
    assert joins.forget([1, 2]) == ("a1",)
    assert joins.waiting == 0
    assert not list(joins)


SOURCES = ("a", "b", "c")


@given(st.data(), st.integers(1, 4), st.integers(1, 3))
def test_every_part_comes_back_exactly_once(data: st.DataObject, count: int, most: int) -> None:
    """Each source speaks once of each request, in any order, while deadlines pass."""
    joins: Joins[int, str, tuple[int, str]] = Joins(most)
    said = [(key, source) for key in range(count) for source in SOURCES]
    back: Counter[tuple[int, str]] = Counter()
    given = []
    now = 0.0
    deadlines = {key: data.draw(st.sampled_from([0.0, 2.0])) for key in range(count)}
    for key, source in data.draw(st.permutations(said)):
        now += data.draw(st.sampled_from([0.0, 1.0]))
        for _, parts in joins.expire(now):
            back.update(parts)
        if data.draw(st.booleans()):
            given.append((key, source))
            found = joins.add(key, SOURCES, source, (key, source), deadlines[key])
            if isinstance(found, Verdict):
                back.update([(key, source)] * (found is not Verdict.WAITING))
            else:
                assert set(found) == set(SOURCES)
                back.update(found.values())
        else:
            back.update(joins.lose(key, SOURCES, source, deadlines[key])[1])
        assert joins.waiting <= most
    assert back == Counter(given)
    assert joins.waiting == 0
    assert not list(joins)
