"""A ceiling: what grpc.aio alone costs. Answers every message of a stream with as many bytes as the real reply has."""

from __future__ import annotations

import argparse
import asyncio
import json
from typing import Any

import grpc

METHOD = "/conveyor.bench/Echo"


class Echo(grpc.GenericRpcHandler):
    """One bidirectional call, in bytes."""

    def __init__(self, reply: bytes) -> None:
        self._reply = reply

    def service(self, handler_call_details: Any) -> Any:
        """Serve the one method there is."""
        return grpc.stream_stream_rpc_method_handler(self._echo)

    async def _echo(self, _: Any, context: Any) -> None:
        while await context.read() is not grpc.aio.EOF:
            await context.write(self._reply)


async def main() -> None:
    """Serve until ended."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--reply-bytes", type=int, required=True)
    options = parser.parse_args()
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0), ("grpc.max_receive_message_length", -1)])
    server.add_generic_rpc_handlers((Echo(bytes(options.reply_bytes)),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(json.dumps({"event": "ready", "port": port}), flush=True)
    await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(main())
