"""What a task asks before it decides: one file is one signal, found by its file name.

Comes from: tasks/
Goes to: tasks/
"""

__all__: list[str] = []
