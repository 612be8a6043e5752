"""What makes a process a good child: it yields to everybody and does not outlive its parent.

Comes from: host.py
Goes to: kernel/hosts.py
"""

import contextlib
import ctypes
import os
import signal
import sys
import threading

__all__ = ["die_with", "make_idle"]


def die_with(parent: int) -> None:
    """Make sure that this process ends when the desk does, even while a task holds it (F33)."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL, 0, 0, 0)
    else:
        threading.Thread(target=_watch, args=(parent,), daemon=True).start()
    if os.getppid() != parent:
        os._exit(1)


def _watch(parent: int) -> None:
    pause = threading.Event()
    while os.getppid() == parent:
        pause.wait(0.5)
    os._exit(1)


def make_idle() -> None:
    """Run only when nobody else wants to: the operating system itself does the preemption."""
    if hasattr(os, "SCHED_IDLE"):
        with contextlib.suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
            return
    with contextlib.suppress(OSError):
        os.nice(19)
