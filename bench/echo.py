"""A ceiling: what grpc.aio alone costs. Answers every message of a stream with as many bytes as the real reply has."""

from __future__ import annotations

import argparse
from typing import Any

import grpc

from bench.serving import EVENT_LOOPS, serve

METHOD = "/conveyor.bench/Echo"
REPLY_BYTES = "reply-bytes"
"""The call's metadata entry that says how long each answer is."""


class Echo(grpc.GenericRpcHandler):
    """One bidirectional call, in bytes."""

    def service(self, handler_call_details: Any) -> Any:
        """Serve the one method there is."""
        return grpc.stream_stream_rpc_method_handler(self._echo)

    async def _echo(self, _: Any, context: Any) -> None:
        reply = bytes(int(dict(context.invocation_metadata())[REPLY_BYTES]))
        while await context.read() is not grpc.aio.EOF:
            await context.write(reply)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--event-loop", choices=EVENT_LOOPS, default="asyncio")
    serve(Echo, parser.parse_args().event_loop)
