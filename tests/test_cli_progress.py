"""Progress of the commands where there is no terminal: a line now and then, none for what is quickly done."""

from __future__ import annotations

import pytest

from fxprune.commands import common


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, in seconds, for tests to move."""
    now = [100.0]
    monkeypatch.setattr("fxprune.commands.common.time.monotonic", lambda: now[0])
    return now


def test_a_log_gets_a_line_every_half_minute(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    said = []
    with common.progress() as advance:
        for step in range(1, 11):
            clock[0] += 12
            advance(f"recovery (loss {step:.1f})", step, 10)
            said += capsys.readouterr().err.splitlines()
    assert said == [
        "recovery (loss 3.0): 3 of 10, 84 s left",
        "recovery (loss 6.0): 6 of 10, 48 s left",
        "recovery (loss 9.0): 9 of 10, 12 s left",
    ]


def test_what_goes_on_after_a_restart_counts_from_where_it_was(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with common.progress() as advance:
        advance("sensitivity", 90, 100)
        clock[0] += 40
        advance("sensitivity", 95, 100)
        advance("perplexity", 1, 2)
    assert capsys.readouterr().err == "sensitivity: 95 of 100, 40 s left\n"


def test_what_is_done_once_more_counts_from_then(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with common.progress() as advance:
        for begin in (0, 3600):
            clock[0] += begin
            for done in range(4):
                advance("measuring all sources (news)", done, 4)
                clock[0] += 40
    lines = [line.rpartition(", ")[2] for line in capsys.readouterr().err.splitlines()]
    assert lines == [
        "120 s left",
        "80 s left",
        "40 s left",
        "measuring all sources (news): 0 of 4",
        *("120 s left", "80 s left", "40 s left"),
    ]
