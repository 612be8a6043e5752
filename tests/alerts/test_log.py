"""The channel that is always there."""

from typing import Any

import pytest

from nightdesk.alerts.log import LogAlert


class Lines:
    def __init__(self) -> None:
        self.written: list[tuple[str, str, dict[str, Any]]] = []

    def __getattr__(self, level: str) -> Any:
        return lambda text, **fields: self.written.append((level, text, fields))


@pytest.mark.parametrize(
    ("level", "method"),
    [
        ("info", "info"),
        ("warning", "warning"),
        ("critical", "critical"),
        ("odd", "error"),
    ],
)
async def test_an_alert_becomes_one_log_line_of_its_level(
    level: str, method: str
) -> None:
    log = Lines()

    await LogAlert(log).send(level, "sell-btc", "stop loss")

    assert log.written == [
        (method, "stop loss", {"alert": level, "source": "sell-btc"})
    ]


async def test_without_a_logger_it_takes_the_processs_own() -> None:
    await LogAlert().send("info", "sell-btc", "hello")
