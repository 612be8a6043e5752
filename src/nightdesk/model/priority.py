"""One scale of priorities, used everywhere."""

from enum import StrEnum

__all__ = ["Priority"]


class Priority(StrEnum):
    """How much a task matters. Names of other designs are accepted by `Priority.parse`."""

    CRITICAL = "critical"
    HIGH = "high"
    NORMAL = "normal"
    LOW = "low"

    @property
    def rank(self) -> int:
        """0 for critical up to 3 for low: the index of the lane."""
        return _RANKS[self]

    @classmethod
    def parse(cls, name: "str | Priority") -> "Priority":
        """Return the priority called `name`, in any case, with the synonyms users bring along.

        Raises:
            ValueError: `name` is no priority.
        """
        if isinstance(name, cls):
            return name
        text = str(name).strip().lower().replace("-", "_").replace(" ", "_")
        try:
            return cls(_SYNONYMS.get(text, text))
        except ValueError:
            raise ValueError(
                f"no priority {str(name)!r}: expected one of critical, high, normal, low "
                "(important = high, medium = normal, nice_to_have = low)"
            ) from None


_SYNONYMS = {"important": "high", "medium": "normal", "nice_to_have": "low"}
_RANKS = {Priority.CRITICAL: 0, Priority.HIGH: 1, Priority.NORMAL: 2, Priority.LOW: 3}
