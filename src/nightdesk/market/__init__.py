"""Books from messages, and the matcher behind the paper venue. Pure and synchronous: no clock, no loop.

Comes from: sources/, venues/paper.py
Goes to: venues/paper.py (statement rows)
"""
