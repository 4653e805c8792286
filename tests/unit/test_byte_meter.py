"""Totals and rates of bytes, from reports."""

from __future__ import annotations

from vsockets.cli.observation import with_unit
from vsockets.model.rates import ByteMeter, Moved


def test_rates_are_those_of_the_last_interval() -> None:
    meter = ByteMeter()
    assert meter.rates(10.0) == (0, 0)
    assert meter.report(Moved(1000, 0), 10.0) == (1000, 0)
    assert meter.rates(10.5) == (1000, 0)
    assert meter.report(Moved(4000, 600), 12.0) == (3000, 600)
    assert meter.rates(12.0) == (1500, 300)
    assert meter.rates(20.0) == (0, 0)
    assert meter.total == (4000, 600)


def test_bytes_after_a_pause_have_not_moved_during_it() -> None:
    meter = ByteMeter()
    meter.report(Moved(1000, 0), 10.0)
    meter.report(Moved(6000, 0), 1000.0)
    assert meter.rates(1000.0) == (2000, 0)


def test_totals_never_decrease() -> None:
    meter = ByteMeter()
    meter.report(Moved(1000, 7), 10.0)
    assert meter.report(Moved(500, 9), 11.0) == (0, 2)
    assert meter.total == (1000, 9)


def test_numbers_have_at_most_four_characters() -> None:
    known = {0: "0", 999: "999", 999.6: "1.0k", 1234: "1.2k", 9_949: "9.9k", 9_960: "10k"}
    known |= {123_456: "123k", 1e6: "1.0M", 5.4e9: "5.4G", 1e12: "1.0T", 1e15: "1000T"}
    assert {number: with_unit(number) for number in known} == known
    assert with_unit(None) == "-"
