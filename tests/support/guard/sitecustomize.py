"""On the PYTHONPATH of services under test: a blocking call on an event loop raises BlockingError there."""

import sys

_GUARDED = ("tidegate_edge", "tidegate_admission", "tidegate_lifecycle")

if any(name in sys.orig_argv for name in _GUARDED):
    from blockbuster import BlockBuster
    from blocking import allow_grpc  # type: ignore[import-not-found]  # this folder is on the path here

    allow_grpc(BlockBuster()).activate()
