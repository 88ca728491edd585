"""Who may wait in a line, and for how long others may join them."""

from __future__ import annotations

from blockflow.gateway.line import Line


def line_of(count: int, *, broken: bool = True) -> Line[int]:
    line: Line[int] = Line()
    if broken:
        line.suspend(0.0)
    for number in range(count):
        line.join(number, 0.0)
    return line


def test_they_stand_in_the_order_in_which_they_came() -> None:
    line = line_of(4)
    line.leave(1)
    line.leave(1)
    line.join(1, 1.0)
    assert list(line) == [0, 2, 3, 1]


def test_without_a_break_others_join_until_the_first_has_waited_for_a_moment() -> None:
    line = line_of(100, broken=False)
    assert line.takes(0.5, overloaded=False)
    assert not line.takes(0.51, overloaded=False)
    assert not line.takes(0.1, overloaded=True)
    assert not line.recovers(0.1)
    for number in range(99):
        line.leave(number)
    line.join(100, 0.6)
    assert not line.takes(0.6, overloaded=False)
    line.leave(99)
    assert line.takes(0.6, overloaded=False)


def test_everybody_may_wait_while_there_is_no_route() -> None:
    line = line_of(10_000)
    assert line.takes(1e6, overloaded=True)
    assert line.recovers(1e6)


def test_after_a_break_others_may_join_for_a_while() -> None:
    line = line_of(10)
    line.resume(3.0)
    assert line.takes(14.9, overloaded=True)
    assert line.recovers(14.9)
    assert not line.takes(15.0, overloaded=False)
    assert not line.recovers(15.0)


def test_after_a_break_a_line_does_not_become_much_longer() -> None:
    line = line_of(10)
    line.resume(3.0)
    for number in range(10, 20):
        assert line.takes(4.0, overloaded=False)
        line.join(number, 4.0)
    assert not line.takes(4.0, overloaded=False)
    line.leave(0)
    assert line.takes(4.0, overloaded=False)


def test_a_second_break_lets_everybody_wait_again() -> None:
    line = line_of(10)
    line.resume(3.0)
    line.suspend(20.0)
    line.suspend(20.5)
    assert line.takes(1e6, overloaded=True)
    line.resume(21.0)
    line.resume(22.0)
    assert line.takes(24.9, overloaded=False)
    assert not line.takes(25.0, overloaded=False)
