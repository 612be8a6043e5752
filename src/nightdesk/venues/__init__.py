"""Doors out: where orders go. One file is one type of venue.

Comes from: orders/, market/
Goes to: kernel/inbox.py (fills and ends come back by the one door)
"""
