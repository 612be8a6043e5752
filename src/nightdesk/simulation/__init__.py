"""The whole desk under a virtual clock and a seed.

Comes from: desk.py
Goes to: kernel/loop.py
"""
