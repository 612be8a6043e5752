"""The last room before money moves: limits on reserved exposure, and the kill switch.

Comes from: orders/protocol.py
Goes to: orders/protocol.py (leave to send, or a denial), stores/ (halts and audit)
"""
