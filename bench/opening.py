"""Sessions that are there before a load and gone after it, and those that stay. Must not know what is sent to them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Sequence
from typing import Any

import grpc

from conveyor.v1 import conveyor_pb2 as pb

OPTIONS = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", -1)]
_AT_ONCE = 256


def resident(number: int) -> str:
    """The name of a session that stays open."""
    return f"resident-{number}"


async def open_sessions(channel: grpc.aio.Channel, model: str, names: Iterable[str]) -> None:
    """Open sessions of a model, many calls at a time."""
    await _each(channel, "OpenSession", [pb.OpenSessionRequest(model=model, session_id=name) for name in names])


async def close_sessions(channel: grpc.aio.Channel, names: Iterable[str]) -> None:
    """Close sessions, likewise."""
    await _each(channel, "CloseSession", [pb.CloseSessionRequest(session_id=name) for name in names])


async def open_residents(port: int, model: str, first: int, until: int) -> float:
    """Open sessions that stay; the seconds that it took."""
    began = time.perf_counter()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=OPTIONS) as channel:
        await open_sessions(channel, model, [resident(number) for number in range(first, until)])
    return time.perf_counter() - began


async def _each(channel: grpc.aio.Channel, method: str, requests: Sequence[Any]) -> None:
    call: Any = channel.unary_unary("/conveyor.v1.ConveyorService/" + method)
    for at in range(0, len(requests), _AT_ONCE):
        await asyncio.gather(*(call(request.SerializeToString()) for request in requests[at : at + _AT_ONCE]))
