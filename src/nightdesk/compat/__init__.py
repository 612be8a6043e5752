"""Faces for code written against other task managers: change the import lines, keep the rest.

| design | import from |
|---|---|
| 001, durable execution tasks | `nightdesk.compat.execution` |
| 003, market hours | `nightdesk.compat.market_hours` |
| 004, registration | `nightdesk.compat.registration` |

Comes from: examples of users
Goes to: desk.py, kernel/scheduler.py
"""
