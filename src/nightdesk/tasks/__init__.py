"""What a desk does: one file is one type of task, found by its file name.

A task reads the market and its own orders through the handle `self.desk`, and remembers in its
context. The ledger is the truth about fills; a context is only memory, so every task derives
what is filled and what is working from `desk.orders()` before it acts.

Comes from: kernel/
Goes to: orders/ (submit, cancel), kernel/ (events)
"""

__all__: list[str] = []
