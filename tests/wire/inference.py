"""A caller of the Open Inference Protocol with plain stubs."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import numpy as np
from numpy.typing import NDArray

from service.server import Server
from service.wire.inference_stubs import inference_pb2 as pb
from service.wire.inference_stubs import inference_pb2_grpc as stubs

Array = NDArray[Any]
Stub = stubs.GRPCInferenceServiceStub

DATATYPES = {"f4": "FP32", "f8": "FP64", "f2": "FP16", "i8": "INT64", "i4": "INT32", "i1": "INT8", "b1": "BOOL"}


def parameter(value: object) -> pb.InferParameter:
    """Return a value in the field that clients put it in."""
    if isinstance(value, bool):
        return pb.InferParameter(bool_param=value)
    if isinstance(value, int):
        return pb.InferParameter(int64_param=value) if value < 1 << 63 else pb.InferParameter(uint64_param=value)
    if isinstance(value, float):
        return pb.InferParameter(double_param=value)
    assert isinstance(value, str)
    return pb.InferParameter(string_param=value)


def request(
    inputs: Array | dict[str, Array], *outputs: str, model: str = "lstm", version: str = "", id: str = "", **given: Any
) -> pb.ModelInferRequest:
    """Return a request with raw contents.

    Args:
        inputs: by their names; an array alone is ``x``.
        outputs: that are wanted; none for all.
        model: its name.
        version: of it.
        id: of the request.
        given: parameters.
    """
    message = pb.ModelInferRequest(model_name=model, model_version=version, id=id)
    for name, value in ({"x": inputs} if not isinstance(inputs, dict) else inputs).items():
        message.inputs.add(name=name, datatype=DATATYPES[value.dtype.str[1:]], shape=value.shape)
        message.raw_input_contents.append(value.tobytes())
    for name in outputs:
        message.outputs.add(name=name)
    for name, value in given.items():
        message.parameters[name].CopyFrom(parameter(value))
    return message


def output(response: pb.ModelInferResponse, name: str = "y") -> Array:
    """Return an output by its name, found at its place as tritonclient finds it."""
    index = [one.name for one in response.outputs].index(name)
    dtypes = {datatype: dtype for dtype, datatype in DATATYPES.items()}
    one = response.outputs[index]
    return np.frombuffer(response.raw_output_contents[index], dtypes[one.datatype]).reshape(tuple(one.shape))


def parameters(response: pb.ModelInferResponse) -> dict[str, Any]:
    """Return a reply's parameters."""
    return {name: getattr(value, value.WhichOneof("parameter_choice")) for name, value in response.parameters.items()}


@asynccontextmanager
async def calling(server: Server) -> AsyncIterator[Stub]:
    """Connect to a server."""
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        yield stubs.GRPCInferenceServiceStub(channel)


async def refusal(call: Any) -> tuple[grpc.StatusCode, str]:
    """Return the status and the text that a call ends with."""
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return error.code(), error.details() or ""
    raise AssertionError("the call succeeded")
