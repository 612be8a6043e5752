"""What we hold and what it earned: fills become positions, profit and equity.

Comes from: orders/protocol.py (fills, each once)
Goes to: risk/gate.py (exposure, daily loss), reports.py
"""
