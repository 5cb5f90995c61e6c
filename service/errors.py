"""Everything that can go wrong, as a tree; knows no library.

::

    ConveyorError
    ├── InvalidRequest            the request can never succeed as it stands
    │   ├── LoadFailed            a model was to be loaded, and its files do not allow it
    │   └── SequenceMissing       a step without START, and no live sequence: none of that id was seen
    │       ├── SequenceEnded     its END has been applied
    │       ├── SequenceExpired   it was idle for too long
    │       └── SequenceLost      its state is gone through no doing of its owner
    ├── NotFound
    │   ├── ModelUnknown
    │   ├── SessionUnknown        no session has had this id here, or it was closed
    │   ├── SessionExpired        it was idle for too long
    │   └── SessionLost           its state is gone through no doing of its owner
    ├── Unsupported               this server does not do what was asked at all
    ├── NotStreamable             the model cannot run step by step
    ├── PositionConflict          the chunk does not begin where the session is
    ├── EpochConflict             it is meant for another life of the session
    ├── SessionExists
    ├── Full                      a limit is reached; the text says which
    ├── Late                      the deadline has passed
    ├── Cancelled                 whoever asked has gone
    ├── Unavailable
    │   ├── Draining
    │   ├── Loading
    │   └── ControlRefused        models are not loaded and unloaded on request here
    └── EngineFailed              ours; the text holds no internals

A caller is told of all these. Beside them stands LoadError, which tells an operator why a model is not served.

``reason`` is stable and fit for programs; the text says what was wrong and what was expected.
"""

from __future__ import annotations

from typing import ClassVar


class ConveyorError(Exception):
    """Any error that a caller is told of."""

    reason: ClassVar[str] = "internal"


class InvalidRequest(ConveyorError):
    """The request can never succeed as it stands."""

    reason = "invalid_request"


class LoadFailed(InvalidRequest):
    """The model that was to be loaded does not load as its files stand."""

    reason = "load_failed"


class SequenceMissing(InvalidRequest):
    """A step without START is for a sequence that is not live."""

    reason = "sequence_unknown"


class SequenceEnded(SequenceMissing):
    """The sequence was ended by its client."""

    reason = "sequence_ended"


class SequenceExpired(SequenceMissing):
    """The sequence was idle for longer than its timeout."""

    reason = "sequence_expired"


class SequenceLost(SequenceMissing):
    """The sequence's state is gone, through no doing of its owner."""

    reason = "sequence_lost"


class NotFound(ConveyorError):
    """What was named is not here."""

    reason = "not_found"


class ModelUnknown(NotFound):
    """No such model, or no such version of it."""

    reason = "model_unknown"


class SessionUnknown(NotFound):
    """No session of that id has been opened by this owner, or it was closed."""

    reason = "session_unknown"


class SessionExpired(NotFound):
    """The session was idle for longer than its timeout."""

    reason = "session_expired"


class SessionLost(NotFound):
    """The session's state is gone, through no doing of its owner."""

    reason = "session_lost"


class Unsupported(ConveyorError):
    """What was asked for is not offered here."""

    reason = "unsupported"


class NotStreamable(ConveyorError):
    """The model cannot run step by step."""

    reason = "not_streamable"


class PositionConflict(ConveyorError):
    """The chunk does not begin where the session is.

    Attributes:
        position: how many steps of the session have been applied.
    """

    reason = "position_conflict"

    def __init__(self, message: str, position: int) -> None:
        super().__init__(message)
        self.position = position


class EpochConflict(ConveyorError):
    """The session was reset, or opened anew, since the epoch that was given."""

    reason = "epoch_conflict"


class SessionExists(ConveyorError):
    """A session of that id is open already."""

    reason = "session_exists"


class Full(ConveyorError):
    """A limit is reached."""

    reason = "full"


class Late(ConveyorError):
    """The deadline passed before the work was applied."""

    reason = "late"


class Cancelled(ConveyorError):
    """Whoever asked has gone before the work was applied."""

    reason = "cancelled"


class Unavailable(ConveyorError):
    """Not now; later, or elsewhere."""

    reason = "unavailable"


class Draining(Unavailable):
    """The server is about to stop."""

    reason = "draining"


class Loading(Unavailable):
    """The model is not ready yet."""

    reason = "loading"


class ControlRefused(Unavailable):
    """This server does not load and unload models on request."""

    reason = "control_refused"


class EngineFailed(ConveyorError):
    """A run of the model failed."""

    reason = "engine_failed"


class LoadError(Exception):
    """A model that cannot be served; the text says why, for the operator."""
