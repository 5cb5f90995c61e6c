"""A ceiling: what grpc.aio alone costs. Answers every message of a stream with as many bytes as the real reply has."""

from __future__ import annotations

import argparse
import asyncio
import json
from typing import Any

import grpc

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


async def serve() -> None:
    """Serve until ended."""
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0), ("grpc.max_receive_message_length", -1)])
    server.add_generic_rpc_handlers((Echo(),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(json.dumps({"event": "ready", "port": port}), flush=True)
    await server.wait_for_termination()


def main() -> None:
    """Serve on the event loop that the command line says."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--event-loop", choices=("asyncio", "uvloop"), default="asyncio")
    factory = None
    if parser.parse_args().event_loop == "uvloop":
        import uvloop

        factory = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(serve())


if __name__ == "__main__":
    main()
