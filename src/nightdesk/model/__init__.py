"""The nouns: what every room talks about. Frozen structs, `Decimal` money, integer nanoseconds.

Comes from: sources/, tasks/, venues/
Goes to: kernel/, orders/, portfolio/, stores/
"""
