"""Exchanges that we run ourselves: the paper venue inside the desk, or in a process that outlives it.

Comes from: desk.py
Goes to: venues/paper.py, venues/paper_remote.py, market/matching.py
"""

from nightdesk.exchange.building import (
    build_paper_venue,
    ensure_paper_process,
    stop_paper_process,
)

__all__ = ["build_paper_venue", "ensure_paper_process", "stop_paper_process"]
