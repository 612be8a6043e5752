"""The printed figure for market hours, on the week that has a holiday in it."""

import pytest

from nightdesk.bench import hours


@pytest.mark.slow
def test_a_week_with_a_holiday_saves_most_of_the_calls_in_closed_hours() -> None:
    pytest.importorskip("pandas_market_calendars")

    result = hours.run("NSE", "2026-11-23")

    assert result["open_hours"] == 25.0  # four sessions of 6.25 h: Tuesday is a holiday
    assert result["sessions"][1] == "Tue 2026-11-24 closed"
    assert result["tasks"]["news_integration"]["closed"] == 0
    assert abs(result["tasks"]["market_monitoring"]["open"] - 25 * 720) <= 5
    assert abs(result["tasks"]["market_monitoring"]["closed"] - 143 * 60) <= 5
    assert result["reduction_closed"] >= 0.6
    assert "91.8% less" in hours.report(result)
