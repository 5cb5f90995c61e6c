"""A peer: the server that a user writes first. A dict of states, and one run of the model for each step at batch 1.

Speaks conveyor.v1's Stream, so that the same load runs against it; of blocks it knows nothing, so that the chunks of a
message come one by one. It keeps no promise: no positions, no limits, nothing survives an error.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import onnxruntime

from conveyor.v1 import conveyor_pb2 as pb
from conveyor.v1 import conveyor_pb2_grpc as stubs
from service.manifest import METADATA_KEY, Manifest


class Loop(stubs.ConveyorServiceServicer):
    """One model, one dict."""

    def __init__(self, path: Path, threads: int) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self._manifest = Manifest.model_validate_json(self._session.get_modelmeta().custom_metadata_map[METADATA_KEY])
        self._zeros = [
            np.zeros([1 if size is None else size for size in state.shape], state.dtype)
            for state in self._manifest.states
        ]
        self._states: dict[str, list[Any]] = {}

    async def OpenSession(self, request: pb.OpenSessionRequest, context: Any) -> pb.OpenSessionResponse:
        """Open a session."""
        self._states[request.session_id] = self._zeros
        return pb.OpenSessionResponse(session=pb.Session(session_id=request.session_id))

    async def CloseSession(self, request: pb.CloseSessionRequest, context: Any) -> pb.CloseSessionResponse:
        """Forget a session."""
        del self._states[request.session_id]
        return pb.CloseSessionResponse()

    async def Stream(self, requests: AsyncIterator[pb.StreamRequest], context: Any) -> AsyncIterator[pb.StreamResponse]:
        """Step each chunk as it comes."""
        async for request in requests:
            yield pb.StreamResponse(results=[self._step(chunk) for chunk in request.chunks])

    def _step(self, chunk: pb.Chunk) -> pb.ChunkResult:
        manifest = self._manifest
        x = np.frombuffer(chunk.inputs[0].data, np.float32).reshape(chunk.inputs[0].shape)
        ys = []
        states = self._states[chunk.session_id]
        for x_t in x:
            feeds = {manifest.inputs[0].name: x_t[None, None]}
            feeds |= {spec.input: state for spec, state in zip(manifest.states, states, strict=True)}
            if manifest.lengths is not None:
                feeds[manifest.lengths] = np.ones(1, np.int32)
            names = [manifest.outputs[0].name, *(spec.output for spec in manifest.states)]
            y, *states = self._session.run(names, feeds)
            ys.append(y[0, 0])
        self._states[chunk.session_id] = states
        whole = np.stack(ys)
        result = pb.ChunkResult(session_id=chunk.session_id, position=chunk.position, steps=len(whole))
        result.outputs.add(name="y", data_type=pb.DATA_TYPE_FLOAT32, shape=whole.shape, data=whole.tobytes())
        return result


async def main() -> None:
    """Serve until ended."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    stubs.add_ConveyorServiceServicer_to_server(Loop(options.model, options.threads), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(json.dumps({"event": "ready", "port": port}), flush=True)
    await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(main())
