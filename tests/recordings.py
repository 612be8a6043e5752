"""Where the recorded market data lies, if it is there: it is not part of the project."""

import os
from pathlib import Path

import pytest


def recording(relative: str) -> Path:
    """Return the path of one recording, or skip the calling test and say why."""
    root = Path(
        os.environ.get(
            "NIGHTDESK_RECORDINGS", Path(__file__).parents[2] / "shared" / "data"
        )
    )
    path = root / relative
    if not path.exists():
        pytest.skip(
            f"recording {relative} is not here (set NIGHTDESK_RECORDINGS to the folder that holds it)"
        )
    return path
