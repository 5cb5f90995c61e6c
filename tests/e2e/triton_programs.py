"""Programs that speak to a server with tritonclient and nothing of ours: ``python -m tests.e2e.triton_programs NAME``.

Each prints what it saw as JSON. They run in processes of their own, because tritonclient's stubs and the server's
register the same protobuf package.
"""

from __future__ import annotations

import asyncio
import json
import queue
import sys
from collections.abc import AsyncIterator, Callable
from typing import Any

import numpy as np
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
from numpy.typing import NDArray
from tritonclient.utils import InferenceServerException

Array = NDArray[Any]
Seen = dict[str, Any]


def inputs(x: Array, name: str = "x") -> list[triton.InferInput]:
    """One input [N, T, 3]."""
    tensor = triton.InferInput(name, list(x.shape), "FP32")
    tensor.set_data_from_numpy(np.ascontiguousarray(x))
    return [tensor]


def error(call: Callable[[], object]) -> list[str | None]:
    """The status and the text that a call ends with."""
    try:
        call()
    except InferenceServerException as failed:
        return [failed.status(), failed.message()]
    return ["no error", ""]


def told(target: str, x: Array) -> Seen:
    """What is told of server and model, synchronously."""
    with triton.InferenceServerClient(target) as client:
        return {
            "live": client.is_server_live(),
            "ready": client.is_server_ready(),
            "model": client.is_model_ready("lstm"),
            "no model": client.is_model_ready("none"),
            "server": client.get_server_metadata(as_json=True),
            "metadata": client.get_model_metadata("lstm", as_json=True),
            "config": client.get_model_config("lstm", as_json=True)["config"],
            "index": client.get_model_repository_index(as_json=True)["models"],
            "shared memory": error(client.get_system_shared_memory_status),
            "trace": error(client.get_trace_settings),
            "log": error(client.get_log_settings),
            "load": error(lambda: client.load_model("lstm")),
        }


def batch(target: str, x: Array) -> Seen:
    """Batches, synchronously and by callback, with outputs chosen; and their statistics."""
    done: queue.Queue[Any] = queue.Queue()
    with triton.InferenceServerClient(target) as client:
        before = client.get_inference_statistics("lstm", as_json=True)["model_stats"]
        whole = client.infer("lstm", inputs(x), request_id="mine")
        chosen = client.infer(
            "lstm",
            inputs(x),
            outputs=[triton.InferRequestedOutput("hT"), triton.InferRequestedOutput("y")],
            timeout=10_000_000,
            priority=1,
        )
        client.async_infer("lstm", inputs(x), lambda result, error: done.put((result, error)))
        result, failed = done.get(timeout=30)
        statistics = client.get_inference_statistics("lstm", as_json=True)["model_stats"]
        return {
            "y": whole.as_numpy("y").tolist(),
            "id": whole.get_response().id,
            "chosen": [one.name for one in chosen.get_response().outputs],
            "hT": list(chosen.as_numpy("hT").shape),
            "same": [np.array_equal(one.as_numpy("y"), whole.as_numpy("y")) for one in (chosen, result)],
            "failed": failed,
            "statistics": [before[0], statistics[0]],
            "unknown model": error(lambda: client.infer("none", inputs(x))),
            "bad shape": error(lambda: client.infer("lstm", inputs(x[:, :, :2]))),
        }


def sequences(target: str, x: Array) -> Seen:
    """Sequences by unary calls, with ids that are numbers and texts."""
    seen: Seen = {"y": []}
    with triton.InferenceServerClient(target) as client:
        for row, sequence_id in enumerate((11, 2**62, "text")):
            steps = [
                client.infer(
                    "lstm",
                    inputs(x[row : row + 1, t : t + 2]),
                    sequence_id=sequence_id,
                    sequence_start=t == 0,
                    sequence_end=t + 2 == x.shape[1],
                ).as_numpy("y")
                for t in range(0, x.shape[1], 2)
            ]
            seen["y"].append(np.concatenate(steps, axis=1)[0].tolist())
        seen["after END"] = error(lambda: client.infer("lstm", inputs(x[:1]), sequence_id=11))
        seen["no START"] = error(lambda: client.infer("lstm", inputs(x[:1]), sequence_id=12))
        client.infer("lstm", inputs(x[:1]), sequence_id=13, sequence_start=True, parameters={"sequence_position": 0})
        seen["conflict"] = error(
            lambda: client.infer("lstm", inputs(x[:1]), sequence_id=13, parameters={"sequence_position": 9})
        )
        again = [
            client.infer("lstm", inputs(x[:1, :2]), sequence_id=13, parameters={"sequence_position": 6}, request_id="r")
            for _ in range(2)
        ]
        seen["replayed"] = np.array_equal(again[0].as_numpy("y"), again[1].as_numpy("y"))
        seen["position"] = again[1].get_response().parameters["sequence_position"].int64_param
        ids = triton.InferInput("sequence_ids", [3], "BYTES")
        ids.set_data_from_numpy(np.array([b"a", b"b", b"c"], np.object_))
        starts = triton.InferInput("sequence_start", [3], "BOOL")
        starts.set_data_from_numpy(np.ones(3, np.bool_))
        seen["together"] = client.infer("lstm", [*inputs(x), ids, starts]).as_numpy("y").tolist()
    return seen


def stream(target: str, x: Array) -> Seen:
    """Several sequences and a batch on one stream, by callback, with an error between."""
    done: queue.Queue[Any] = queue.Queue()
    answers: list[Any] = []
    with triton.InferenceServerClient(target) as client:
        client.start_stream(lambda result, error: done.put((result, error)))
        for t in range(x.shape[1]):
            for row in range(len(x)):
                client.async_stream_infer(
                    "lstm",
                    inputs(x[row : row + 1, t : t + 1]),
                    request_id=f"{row}.{t}",
                    sequence_id=f"stream {row}",
                    sequence_start=t == 0,
                    sequence_end=t == x.shape[1] - 1,
                    enable_empty_final_response=True,
                )
        client.async_stream_infer("lstm", inputs(x[:1]), request_id="bad", sequence_id=99)
        client.async_stream_infer("lstm", inputs(x), request_id="batch")
        for _ in range(x.size // x.shape[2] + 2):
            result, failed = done.get(timeout=30)
            if failed is not None:
                answers.append({"error": failed.message()})
                continue
            response = result.get_response()
            answers.append(
                {
                    "id": response.id,
                    "y": result.as_numpy("y").tolist(),
                    "final": response.parameters["triton_final_response"].bool_param,
                }
            )
        client.stop_stream()
    return {"answers": answers}


def asynchronous(target: str, x: Array) -> Seen:
    """The same with asyncio: what is told, a batch, a sequence by unary calls, and a stream."""

    async def requests() -> AsyncIterator[dict[str, Any]]:
        for t in range(x.shape[1]):
            for row in range(len(x)):
                yield {
                    "model_name": "lstm",
                    "inputs": inputs(x[row : row + 1, t : t + 1]),
                    "request_id": f"{row}.{t}",
                    "sequence_id": 100 + row,
                    "sequence_start": t == 0,
                    "sequence_end": t == x.shape[1] - 1,
                }
        yield {"model_name": "lstm", "inputs": inputs(x[:1]), "request_id": "bad", "sequence_id": 99}

    async def main() -> Seen:
        seen: Seen = {"answers": []}
        async with triton_aio.InferenceServerClient(target) as client:
            seen["ready"] = await client.is_server_ready() and await client.is_model_ready("lstm", "1")
            seen["metadata"] = await client.get_model_metadata("lstm", as_json=True)
            seen["y"] = (await client.infer("lstm", inputs(x))).as_numpy("y").tolist()
            steps = [
                await client.infer("lstm", inputs(x[:1, t : t + 3]), sequence_id=7, sequence_start=t == 0)
                for t in range(0, x.shape[1], 3)
            ]
            seen["sequence"] = np.concatenate([step.as_numpy("y") for step in steps], axis=1)[0].tolist()
            async for result, failed in client.stream_infer(requests()):
                if failed is not None:
                    seen["answers"].append({"error": failed.message()})
                else:
                    seen["answers"].append({"id": result.get_response().id, "y": result.as_numpy("y").tolist()})
        return seen

    return asyncio.run(main())


def control(target: str, x: Array) -> Seen:
    """Models loaded and unloaded while a sequence goes on."""
    seen: Seen = {}
    with triton.InferenceServerClient(target) as client:

        def index() -> dict[str, str]:
            models = client.get_model_repository_index(as_json=True)["models"]
            return {model["name"]: model["state"] for model in models}

        seen["before"] = index()
        seen["not loaded"] = error(lambda: client.infer("lstm", inputs(x)))
        client.load_model("lstm")
        first = client.infer("lstm", inputs(x[:1, :3]), sequence_id=1, sequence_start=True).as_numpy("y")
        client.load_model("other")
        seen["other"] = client.infer("other", inputs(x)).as_numpy("y").tolist()
        seen["loaded"] = index()
        client.unload_model("lstm")
        seen["unloaded"] = index()
        seen["new work"] = error(lambda: client.infer("lstm", inputs(x)))
        seen["new sequence"] = error(lambda: client.infer("lstm", inputs(x[:1]), sequence_id=2, sequence_start=True))
        rest = client.infer("lstm", inputs(x[:1, 3:]), sequence_id=1, sequence_end=True).as_numpy("y")
        seen["sequence"] = np.concatenate([first, rest], axis=1)[0].tolist()
        seen["no such model"] = error(lambda: client.load_model("none"))
        seen["with a configuration"] = error(lambda: client.load_model("other", config="{}"))
        client.load_model("lstm")
        seen["again"] = client.infer("lstm", inputs(x)).as_numpy("y").tolist()
    return seen


def asynchronous_control(target: str, x: Array) -> Seen:
    """Models loaded and unloaded with the asyncio client."""

    async def main() -> Seen:
        seen: Seen = {}
        async with triton_aio.InferenceServerClient(target) as client:

            async def index() -> dict[str, str]:
                models = (await client.get_model_repository_index(as_json=True))["models"]
                return {model["name"]: model["state"] for model in models}

            await client.load_model("lstm")
            seen["loaded"] = await index()
            seen["y"] = (await client.infer("lstm", inputs(x))).as_numpy("y").tolist()
            await client.unload_model("lstm")
            seen["unloaded"] = await index()
            try:
                await client.load_model("none")
            except InferenceServerException as failed:
                seen["no such model"] = failed.status()
        return seen

    return asyncio.run(main())


PROGRAMS: dict[str, Callable[[str, Array], Seen]] = {
    program.__name__: program
    for program in (told, batch, sequences, stream, asynchronous, control, asynchronous_control)
}

if __name__ == "__main__":
    _, name, target, x_file = sys.argv
    json.dump(PROGRAMS[name](target, np.load(x_file)), sys.stdout)
