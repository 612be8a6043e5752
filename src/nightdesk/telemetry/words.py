"""Text from elsewhere, made fit to be written and shown: names of files, errors of tasks, words of venues.

Comes from: control.py, cli/, telemetry/logs.py
Goes to: cli/output.py
"""

__all__ = ["sayable", "visible"]


def sayable(text: str) -> str:
    r"""Return `text` as UTF-8 can say it. Names of files may hold other bytes; Python keeps them as `\udcff`."""
    if text.isascii():
        return text
    return text.encode("utf-8", "backslashreplace").decode()


def visible(text: str, keep: str = "") -> str:
    """Return `text` with what a terminal would obey shown instead: no line may paint over another, or forge one.

    Args:
        keep: Control characters that may stay, such as the line ends of a traceback.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else ascii(c)[1:-1] for c in text)
