"""Doors in: where events come from. One file is one type of source.

Comes from: model/events.py
Goes to: kernel/inbox.py
"""
