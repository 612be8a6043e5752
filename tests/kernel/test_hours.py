"""Market hours: right on the days that matter, quick to ask, and honest about what is not known."""

import json
import subprocess
import sys
from datetime import date, datetime, timedelta
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest

from fakes.scheduling import SECOND_NS, instant_ns
from nightdesk.errors import ConfigError, MissingExtraError, UnknownTypeError
from nightdesk.kernel import hours
from nightdesk.kernel.hours import (
    Calendar,
    Calendars,
    SessionOverride,
    instant_in_words,
)
from recordings import recording

INDIA = ZoneInfo("Asia/Kolkata")


def india(text: str) -> int:
    return instant_ns(f"{text}+05:30")


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("pandas_market_calendars")
    return tmp_path_factory.mktemp("calendars")


@pytest.fixture(scope="module")
def nse(cache_dir: Path) -> Calendar:
    return Calendars(cache_dir).get("NSE")


@pytest.mark.parametrize(
    ("moment", "is_open"),
    [
        ("2026-11-23T09:14:59", False),
        ("2026-11-23T09:15:00", True),
        ("2026-11-23T15:29:59", True),
        ("2026-11-23T15:30:00", False),
        ("2026-11-22T12:00:00", False),  # Sunday
        ("2026-11-24T12:00:00", False),  # Guru Nanak Jayanti
        ("2026-01-26T12:00:00", False),  # Republic Day
        ("2026-02-01T12:00:00", True),  # Sunday, Union Budget
        ("2025-02-01T12:00:00", True),  # Saturday, Union Budget
        ("2024-11-01T12:00:00", False),  # Diwali
        ("2024-11-01T18:30:00", True),  # Muhurat session
        ("2025-10-21T14:00:00", True),
        ("2025-10-21T10:00:00", False),
        ("2008-01-02T10:00:00", True),  # 09:55 in those days
        ("2008-01-02T09:30:00", False),
    ],
)
def test_nse_keeps_its_hours_holidays_and_special_sessions(
    nse: Calendar, moment: str, is_open: bool
) -> None:
    assert nse.is_open(india(moment)) is is_open
    assert nse.phase(india(moment)) == ("open" if is_open else "closed")


def test_the_next_change_leads_over_weekends_and_holidays(nse: Calendar) -> None:
    assert nse.next_change(india("2026-11-20T16:00:00")) == india("2026-11-23T09:15:00")
    assert nse.next_change(india("2026-11-23T16:00:00")) == india("2026-11-25T09:15:00")
    assert nse.next_change(india("2026-11-23T10:00:00")) == india("2026-11-23T15:30:00")
    assert nse.describe(india("2026-11-20T16:00:00")) == "closed until Mon 09:15 IST"
    assert nse.describe(india("2026-11-23T10:00:00")) == "open until Mon 15:30 IST"


def test_holidays_agree_with_an_independent_table(nse: Calendar) -> None:
    """Every weekday of ten years, against the session table that another engine ships."""
    path = recording("nse/market_hours_india.json")
    table = json.loads(path.read_text())["Equity-india-[*]"]
    holidays = {
        date(int(year), int(month), int(day))
        for month, day, year in (text.split("/") for text in table["holidays"])
    }
    different = []
    day = date(2015, 1, 1)
    while day < date(2019, 12, 31):
        noon = datetime(day.year, day.month, day.day, 12, tzinfo=INDIA)
        expected = day.weekday() < 5 and day not in holidays
        if nse.is_open(int(noon.timestamp()) * SECOND_NS) is not expected:
            different.append(day)
        day += timedelta(days=1)

    # The other table lacks the budget Saturday, and days that were declared at short notice.
    assert len(different) <= 6
    assert date(2015, 2, 28) in different


def test_after_the_last_known_holiday_the_table_is_unverified(nse: Calendar) -> None:
    assert nse.verified(india("2026-12-25T12:00:00"))
    assert not nse.verified(india("2026-12-26T12:00:00"))
    assert "unverified" in nse.describe(india("2027-01-26T12:00:00"))
    assert nse.warning(india("2026-08-01T12:00:00")) is None
    assert "no holiday is known after 2026-12-25" in (
        nse.warning(india("2026-11-01T12:00:00")) or ""
    )


def test_a_desk_with_a_kept_table_does_not_import_pandas(cache_dir: Path) -> None:
    Calendars(cache_dir).get("NSE")
    script = (
        "import sys; from pathlib import Path;"
        "from nightdesk.kernel.hours import Calendars;"
        f"c = Calendars(Path({str(cache_dir)!r}));"
        "assert c.get('24/7').is_open(0);"
        "assert c.get('NSE').timezone == 'Asia/Kolkata';"
        "assert 'pandas' not in sys.modules, 'pandas'"
    )

    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"format": 99}'])
def test_a_damaged_table_is_compiled_again(tmp_path: Path, damage: bytes) -> None:
    pytest.importorskip("pandas_market_calendars")
    (tmp_path / "NSE.json").write_bytes(damage)

    calendar = Calendars(tmp_path).get("NSE")

    assert calendar.is_open(india("2026-11-23T10:00:00"))
    assert len((tmp_path / "NSE.json").read_bytes()) > 1000


def test_a_table_that_cannot_be_kept_is_used_all_the_same(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("pandas_market_calendars")
    (tmp_path / "file").write_text("no directory")

    calendar = Calendars(tmp_path / "file").get("NSE")

    assert calendar.is_open(india("2026-11-23T10:00:00"))
    assert "are not kept" in caplog.text


@pytest.mark.parametrize("name", ["XNSE", "nse", " NSE "])
def test_aliases_lead_to_the_same_hours(cache_dir: Path, name: str) -> None:
    calendar = Calendars(cache_dir).get(name)

    assert calendar.is_open(india("2026-02-01T12:00:00"))


def test_new_york_follows_its_own_clock_and_closes_early(cache_dir: Path) -> None:
    nyse = Calendars(cache_dir).get("XNYS")

    assert nyse.next_change(instant_ns("2026-07-06T00:00:00+00:00")) == instant_ns(
        "2026-07-06T13:30:00+00:00"
    )
    assert nyse.next_change(instant_ns("2026-12-07T00:00:00+00:00")) == instant_ns(
        "2026-12-07T14:30:00+00:00"
    )
    assert not nyse.is_open(instant_ns("2026-11-27T18:30:00+00:00"))
    assert nyse.horizon_ns is None
    assert nyse.verified(instant_ns("2035-01-02T18:30:00+00:00"))
    assert nyse.warning(instant_ns("2035-01-02T18:30:00+00:00")) is None


def test_a_lunch_break_is_closed(cache_dir: Path) -> None:
    tokyo = Calendars(cache_dir).get("JPX")

    assert tokyo.is_open(instant_ns("2026-11-24T10:00:00+09:00"))
    assert not tokyo.is_open(instant_ns("2026-11-24T12:00:00+09:00"))
    assert tokyo.is_open(instant_ns("2026-11-24T13:00:00+09:00"))


def test_overrides_add_move_and_remove_sessions(cache_dir: Path) -> None:
    calendars = Calendars(
        cache_dir,
        {
            "XNSE": [
                SessionOverride(date="2026-11-08", open="18:15", close="19:15"),
                SessionOverride(date="2026-11-23", open="09:15", close="12:00"),
                SessionOverride(date="2026-11-23", open="13:00", close="14:00"),
                SessionOverride(date="2026-11-25"),
                SessionOverride(date="2026-11-27", open="22:00", close="02:00"),
            ]
        },
    )

    nse = calendars.get("NSE")

    assert nse.is_open(india("2026-11-08T18:30:00"))
    assert not nse.is_open(india("2026-11-23T12:30:00"))
    assert nse.is_open(india("2026-11-23T13:30:00"))
    assert not nse.is_open(india("2026-11-25T12:00:00"))
    assert nse.is_open(india("2026-11-28T01:00:00"))


def test_holidays_that_the_user_lists_move_the_horizon(cache_dir: Path) -> None:
    days = [SessionOverride(date="2027-11-24", source="NSE circular")]

    nse = Calendars(cache_dir, {"NSE": days}).get("NSE")

    assert nse.verified(india("2027-11-24T12:00:00"))
    assert nse.warning(india("2026-11-24T12:00:00")) is None


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        (SessionOverride(date="2026-13-01"), "2026-13-01 00:00 is no local"),
        (SessionOverride(date="2026-11-08", open="18:15"), "only one of"),
        (
            SessionOverride(date="2026-11-08", open="6 pm", close="7 pm"),
            "no local date",
        ),
    ],
)
def test_a_bad_override_is_named(
    cache_dir: Path, override: SessionOverride, problem: str
) -> None:
    with pytest.raises(ConfigError, match=problem) as error:
        Calendars(cache_dir, {"NSE": [override]}).get("NSE")

    assert "calendar_overrides.NSE" in str(error.value)


def test_an_unknown_exchange_is_refused_with_a_suggestion() -> None:
    pytest.importorskip("pandas_market_calendars")

    with pytest.raises(UnknownTypeError, match="Did you mean 'NSE'"):
        Calendars().get("NSEE")


@pytest.mark.parametrize("name", ["24/7", "24x7", "always", ""])
def test_round_the_clock_needs_no_library(name: str) -> None:
    calendar = Calendars().get(name)

    assert calendar.is_open(0)
    assert calendar.next_change(0) is None
    assert calendar.describe(0) == "always open"
    assert calendar.warning(0) is None


def test_a_missing_library_is_one_line_with_the_command(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hours, "_LIBRARY", "not-installed-at-all")

    with pytest.raises(MissingExtraError, match=r"nightdesk\[markets\]"):
        Calendars().get("NSE")


def test_sessions_that_touch_become_one() -> None:
    assert hours._changes([(50, 60), (10, 20), (20, 30), (25, 28), (40, 40)]) == [
        10,
        30,
        50,
        60,
    ]


def test_instants_far_away_carry_their_date() -> None:
    now = india("2026-11-21T10:00:00")

    assert instant_in_words(india("2026-11-23T09:15:00"), now, "Asia/Kolkata") == (
        "Mon 09:15 IST"
    )
    assert instant_in_words(india("2026-12-23T09:15:00"), now, "Asia/Kolkata") == (
        "Wed 2026-12-23 09:15 IST"
    )
