"""On the PYTHONPATH of services under test: a blocking call on an event loop raises BlockingError there."""

import sys

_GUARDED = ("tidegate_edge", "tidegate_admission", "tidegate_lifecycle")

if any(name in sys.orig_argv for name in _GUARDED):
    from blockbuster import BlockBuster

    guard = BlockBuster()
    # grpc.aio joins its poller thread when its last server or channel is collected, at the process' end.
    guard.functions["lock.acquire"].can_block_in("threading.py", {"_wait_for_tstate_lock", "join"})
    guard.activate()
