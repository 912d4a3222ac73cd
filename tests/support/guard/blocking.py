"""What may block an event loop under test: nothing, but for one call that isn't ours."""

from __future__ import annotations

from blockbuster import BlockBuster


def allow_grpc(guard: BlockBuster) -> BlockBuster:
    """grpc.aio joins its poller thread whenever its last server or channel of a process is collected."""
    guard.functions["threading.Lock.acquire"].can_block_in("threading.py", {"_wait_for_tstate_lock", "join"})
    return guard
