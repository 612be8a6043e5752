"""Benchmarks, one file per promise of the README: `nightdesk bench`, and thin scripts in `benchmarks/`.

Comes from: cli/
Goes to: kernel/
"""
