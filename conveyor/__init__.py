"""Client for Conveyor, an inference service for recurrent sequence models: numpy in, numpy out.

::

    from conveyor import Client

    with Client("127.0.0.1:8500") as client:
        y = client.infer("digits", x)                # x[N, T, I] -> y[N, T, O]
        with client.session("digits") as session:
            for row in x[0]:
                y = session.step(row)                # [I] -> [O]; the server keeps the state

``AsyncClient`` is the same for asyncio.
"""

from importlib.metadata import PackageNotFoundError, version

from conveyor.async_client import AsyncClient, InferResult
from conveyor.async_session import AsyncSession
from conveyor.client import Client
from conveyor.errors import (
    Cancelled,
    ConnectionLost,
    ConveyorError,
    Draining,
    EngineFailed,
    EpochConflict,
    Full,
    InvalidRequest,
    Late,
    Loading,
    ModelUnknown,
    NotFound,
    NotStreamable,
    PositionConflict,
    ProtocolError,
    SessionExists,
    SessionExpired,
    SessionLost,
    SessionUnknown,
    StepsFailed,
    TimedOut,
    Unavailable,
)
from conveyor.framing import Frames, frames
from conveyor.model import Model, TensorSpec
from conveyor.session import Session
from conveyor.state import SessionState

__all__ = [
    "AsyncClient",
    "AsyncSession",
    "Cancelled",
    "Client",
    "ConnectionLost",
    "ConveyorError",
    "Draining",
    "EngineFailed",
    "EpochConflict",
    "Frames",
    "Full",
    "InferResult",
    "InvalidRequest",
    "Late",
    "Loading",
    "Model",
    "ModelUnknown",
    "NotFound",
    "NotStreamable",
    "PositionConflict",
    "ProtocolError",
    "Session",
    "SessionExists",
    "SessionExpired",
    "SessionLost",
    "SessionState",
    "SessionUnknown",
    "StepsFailed",
    "TensorSpec",
    "TimedOut",
    "Unavailable",
    "__version__",
    "frames",
]

try:
    __version__ = version("conveyor")
except PackageNotFoundError:  # Run from a checkout where it is not installed, as in the server's image.
    __version__ = "unknown"
