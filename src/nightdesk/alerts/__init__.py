"""Ways to tell the operator. One file per channel.

Comes from: desk.py
Goes to: telemetry/logs.py
"""
