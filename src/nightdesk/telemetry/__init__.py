"""Watching the desk: logs, and a judgement of its health. Nothing here can change what it watches.

Comes from: kernel/, desk.py
Goes to: cli/, operations.py
"""
