"""Ragged batches over a socket: rows one behind the other give what they give padded, and no padding is sent."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from numpy.typing import NDArray

from conveyor import AsyncClient, InvalidRequest
from conveyor.v1 import conveyor_pb2 as pb
from conveyor.v1 import conveyor_pb2_grpc as stubs
from tests.any_graphs import GRU, draw, model, place
from tests.conftest import calling, running
from tests.graphs import HIDDEN, INPUT, OUTPUT, expected
from tests.wire.native import array, tensor

Array = NDArray[Any]

LENGTHS = [4, 1, 7, 2]
ROWS = [
    np.random.default_rng(n).standard_normal((length, INPUT)).astype(np.float32) for n, length in enumerate(LENGTHS)
]

GRAPH = """g (int64[N, T] ids, float[T, N, 3] x, int32[N] lengths, float[1, N, 4] h0)
    => (float[T, N, 4] y, float[N, 4] last, float[1, N, 4] hT) {
    turned = Transpose<perm = [1, 0]>(ids)
    e = Gather(table, turned)
    s = Add(e, x)
    Y, hT = GRU<hidden_size = 4>(s, W, R, , lengths, h0)
    y = Squeeze(Y, axis)
    last = Squeeze(hT, first)
}"""
DESCRIPTION = """\
    inputs:
      ids: {batch_axis: 0, time_axis: 1, below: 5}
      x: {time_axis: 0, batch_axis: 1}
      lengths: {role: lengths}
    states: [{name: h, input: h0, output: hT, batch_axis: 1}]
    outputs:
      y: {time_axis: 0, batch_axis: 1}
      last: {batch_axis: 0}
    """


@pytest.fixture
async def stub(lstm_repository: Path) -> AsyncIterator[stubs.ConveyorServiceStub]:
    """A server of small limits with the model ``lstm``."""
    async with running(lstm_repository, max_batch=4, max_steps=8) as server, calling(server) as stub:
        yield stub


def request(**changed: Any) -> pb.InferRequest:
    """A ragged request, with something else about it."""
    fields: dict[str, Any] = {
        "model": "lstm",
        "inputs": [tensor(np.concatenate(ROWS))],
        "lengths": LENGTHS,
        "ragged": True,
    }
    return pb.InferRequest(**fields | changed)


async def test_nothing_stands_between_rows(stub: stubs.ConveyorServiceStub) -> None:
    """Outputs are as long as the rows together, final states one for each; both are those of the padded batch."""
    reply = await stub.Infer(request(return_states=True))
    padded = np.stack([np.concatenate([row, np.full((7 - len(row), INPUT), 9, np.float32)]) for row in ROWS])
    same = await stub.Infer(request(inputs=[tensor(padded)], ragged=False, return_states=True))
    (y,), (whole,) = reply.outputs, same.outputs
    assert list(y.shape) == [sum(LENGTHS), OUTPUT]
    assert len(y.data) == 4 * sum(LENGTHS) * OUTPUT
    for row, begin, of_padded, x in zip(LENGTHS, np.cumsum([0, *LENGTHS]), array(whole), ROWS, strict=False):
        np.testing.assert_array_equal(array(y)[begin : begin + row], of_padded[:row])
        np.testing.assert_allclose(of_padded[:row], expected(x), rtol=0, atol=2e-6)
    assert [(list(state.shape), state.name) for state in reply.final_states] == [
        ([4, 1, HIDDEN], "h"),
        ([4, 1, HIDDEN], "c"),
    ]
    assert list(reply.final_states) == list(same.final_states)


async def test_they_begin_from_states(stub: stubs.ConveyorServiceStub) -> None:
    """The first half of each row and then the second are the whole."""
    whole = array((await stub.Infer(request())).outputs[0])
    first, second = [row[:1] for row in ROWS], [row[1:] for row in ROWS]
    begun = await stub.Infer(request(inputs=[tensor(np.concatenate(first))], lengths=[1] * 4, return_states=True))
    rest = [n for n, row in enumerate(second) if len(row)]
    states = [tensor(array(state)[rest], state.name) for state in begun.final_states]
    ended = await stub.Infer(
        request(
            inputs=[tensor(np.concatenate(second))],
            lengths=[len(second[n]) for n in rest],
            initial_states=states,
        )
    )
    begins = np.cumsum([0, *LENGTHS])[:-1]
    np.testing.assert_array_equal(array(begun.outputs[0]), whole[begins])
    np.testing.assert_array_equal(array(ended.outputs[0]), np.delete(whole, begins, axis=0))


async def test_several_inputs_and_outputs(tmp_path: Path) -> None:
    """Integers beside floats; of an output without time there is one value a row."""
    weights = GRU | {"table": draw(5, 3), "first": np.array([0], np.int64)}
    place(tmp_path, "any", model(GRAPH, weights), DESCRIPTION)
    random = np.random.default_rng(0)
    ids = [random.integers(0, 5, length) for length in LENGTHS]
    async with running(tmp_path) as server, AsyncClient(f"127.0.0.1:{server.port}") as client:
        both: dict[str, list[Array]] = {"ids": [*ids], "x": ROWS}
        ragged = await client.infer("any", both, return_states=True)
        for n, (row_ids, x) in enumerate(zip(ids, ROWS, strict=True)):
            one: dict[str, Array] = {"ids": row_ids[None], "x": x[None]}
            alone = await client.infer("any", one, return_states=True)
            np.testing.assert_array_equal(ragged.outputs["y"][n], alone.outputs["y"][0])
            np.testing.assert_array_equal(ragged.outputs["last"][n], alone.outputs["last"][0])
            np.testing.assert_array_equal(ragged.states["h"][n], alone.states["h"][0])
        with pytest.raises(InvalidRequest, match="input 'ids' holds 5; expected 0 to 4"):
            bad: dict[str, list[Array]] = {"ids": [np.array([1, 5])], "x": [ROWS[0][:2]]}
            await client.infer("any", bad)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"lengths": []}, "the batch has no rows (N = 0); expected at least 1"),
        ({"lengths": [14, 0]}, "row 0: there are 14 steps; this server takes up to 8 in one sequence or chunk"),
        ({"lengths": [8, 6, 0]}, "row 2: there are no steps (T = 0); expected at least 1"),
        ({"lengths": [4, 4, 4, 1, 1]}, "the batch has 5 rows; this server takes up to 4"),
        ({"lengths": [4, 1, 7, 3]}, "input 'x' is [14, 3]; expected [15, ...], the sum of the lengths"),
        ({"inputs": [tensor(np.zeros((4, 7, INPUT)))]}, "has shape [4, 7, 3]; expected [sum of lengths, 3]"),
        ({"inputs": [tensor(np.full((14, INPUT), np.inf))]}, "input 'x' holds NaN or infinity"),
        ({"initial_states": [tensor(np.zeros((3, 1, HIDDEN)), s) for s in "hc"]}, "expected [4, 1, 5]"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_what_does_not_fit_is_refused(
    stub: stubs.ConveyorServiceStub, changed: dict[str, Any], says: str
) -> None:
    """In words, and nobody else is disturbed."""
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await stub.Infer(request(**changed))
    assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert says in (refused.value.details() or "")
    assert (await stub.Infer(request())).outputs


async def test_padding_that_is_not_sent_is_not_counted(lstm_repository: Path) -> None:
    """What would be too large padded fits: one long row and many short ones."""
    rows = [np.zeros((length, INPUT), np.float32) for length in [1000, *[1] * 50]]
    async with (
        running(lstm_repository, max_message_bytes=20_000) as server,
        AsyncClient(f"127.0.0.1:{server.port}") as client,
    ):
        assert [len(y) for y in await client.infer("lstm", rows)] == [len(row) for row in rows]
        with pytest.raises(InvalidRequest, match="the reply would hold"):
            await client.infer("lstm", [np.zeros((1, INPUT), np.float32)] * 500, return_states=True)
