"""The gRPC server of a ceiling: on the event loop that is asked for. Knows nothing of its calls."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable

import grpc

EVENT_LOOPS = ("asyncio", "uvloop")


def serve(make: Callable[[], grpc.GenericRpcHandler], event_loop: str) -> None:
    """Serve until ended.

    Args:
        make: gives what answers calls, made in the event loop that they come in on.
        event_loop: one of ``EVENT_LOOPS``.
    """
    factory = None
    if event_loop == "uvloop":
        import uvloop

        factory = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(_serve(make))


async def _serve(make: Callable[[], grpc.GenericRpcHandler]) -> None:
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0), ("grpc.max_receive_message_length", -1)])
    server.add_generic_rpc_handlers((make(),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(json.dumps({"event": "ready", "port": port}), flush=True)
    await server.wait_for_termination()
