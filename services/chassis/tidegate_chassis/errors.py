"""One error with a reason; the wire's form of it is made at the border (`rpc.py`)."""

from __future__ import annotations

import grpc


class Refused(Exception):
    """A request that can't be carried out: a reason of the service's proto, and words for people."""

    def __init__(self, code: grpc.StatusCode, reason: str, message: str, retry_after: float = 0.0) -> None:
        super().__init__(message)
        self.code = code
        """Status on the wire."""
        self.reason = reason
        """Name of a value of the proto's enum Reason, such as REASON_NOT_FOUND."""
        self.message = message
        """What happened and what to do; no paths, no secrets."""
        self.retry_after = retry_after
        """Seconds after which a retry may help; 0 = it can't."""
