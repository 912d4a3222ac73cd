"""On the PYTHONPATH of services under test: a blocking call on an event loop raises BlockingError there."""

import os
import sys
from pathlib import Path

_GUARDED = ("tidegate_edge", "tidegate_admission", "tidegate_lifecycle")

sys.modules["rich"] = None  # type: ignore[assignment]  # there by the linter's leave alone, and slow to import

for _service in (name for name in _GUARDED if name in sys.orig_argv):
    import callbacks  # type: ignore[import-not-found]  # this folder is on the path here
    from blockbuster import BlockBuster
    from blocking import allow_grpc  # type: ignore[import-not-found]

    if callbacks.FOLDER in os.environ:  # no service here writes files on its loop but by this very measuring
        callbacks.measure(Path(os.environ[callbacks.FOLDER]), _service)
    else:
        allow_grpc(BlockBuster()).activate()
