"""The normal start (R-9): the same steps after a crash, after a clean stop, and on the first day.

Comes from: desk.py
Goes to: orders/protocol.py

The order matters, and `desk.py` keeps it by awaiting one thing after the other:

1. the store takes its lock and a new epoch, cuts a torn tail and checks what it reads;
2. the gate takes up the kill switch, so that a halt is in force before anything could be sent;
3. the venues open, and what they emit waits until the ledger is there;
4. `OrderProtocol.recover` reads the ledger, measures the venues' clocks, resolves every open intent,
   sweeps the open orders, books missed fills, compares balances, and returns a `RecoveryReport`;
5. only then do tasks start, sources open and the resolver go on with what is still unknown.

A difference does not end the process, which a service manager would start again for ever: the desk
comes up halted and shows what differs.
"""

from nightdesk.model.recovery import RecoveryReport, RecoveryStep

__all__ = ["RecoveryReport", "RecoveryStep"]
