"""Every error BlockFlow raises on purpose.

    BlockFlowError
    ├── InvalidInput           the caller's fault: HTTP 400
    │   ├── TopologyInvalid    every problem of a refused topology: HTTP 422
    │   ├── ModelRefused       a model or file that cannot become blocks
    │   ├── UploadsOff         artifacts are not taken: HTTP 403
    │   ├── Poisonous          a request that every worker died of: HTTP 422
    │   └── RequestInvalid     a malformed inference request
    │       └── RequestTooLarge                                   HTTP 413
    ├── NotFound               no such artifact, block or pipeline: HTTP 404
    ├── StoreCorrupt           a file of the store does not match its digest: HTTP 500
    ├── Unavailable            BlockFlow cannot serve this now: HTTP 503
    │   ├── Overloaded         a queue is full: HTTP 429
    │   └── BlockFailed        a block failed while it held the request: HTTP 500
    ├── DeadlineExceeded       the request's time ran out: HTTP 504
    └── StartFailed            a process or block did not come up
        └── NotInTime          within the time that the caller gave: HTTP 409

A message says what happened, to which object, and what to do about it.
"""

from __future__ import annotations

from collections.abc import Sequence


class BlockFlowError(Exception):
    """Root of the tree; `status` is the HTTP status that this error maps to."""

    status = 500


class InvalidInput(BlockFlowError):
    status = 400


class TopologyInvalid(InvalidInput):
    """A topology that cannot be deployed; `problems` lists everything that is wrong with it."""

    status = 422

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        count = len(self.problems)
        head = "1 problem" if count == 1 else f"{count} problems"
        super().__init__(f"the topology has {head}: " + "; ".join(self.problems))


class ModelRefused(InvalidInput):
    """A model, or a file that holds one, that cannot become blocks."""


class Poisonous(InvalidInput):
    """A request that was being computed each time when a worker died, more than once."""

    status = 422


class RequestInvalid(InvalidInput):
    """A client's inference request that does not fit the pipeline or the protocol."""


class UploadsOff(InvalidInput):
    """The server was not told to take artifacts from others."""

    status = 403


class RequestTooLarge(RequestInvalid):
    status = 413


class NotFound(BlockFlowError):
    status = 404


class StoreCorrupt(BlockFlowError):
    """A file of the artifact store is missing, damaged, or not what its digest says."""


class Unavailable(BlockFlowError):
    """`retry_after`: seconds after which it may be worth trying again."""

    status = 503

    def __init__(self, message: str, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Overloaded(Unavailable):
    status = 429


class BlockFailed(Unavailable):
    """A block raised an error while it computed this request."""

    status = 500


class DeadlineExceeded(BlockFlowError):
    status = 504


class StartFailed(BlockFlowError):
    """A process or a block did not become ready; the message carries its own last words."""


class NotInTime(StartFailed):
    """It did not become ready within the time that whoever asked for it gave."""

    status = 409
