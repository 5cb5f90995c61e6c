"""What the benchmark's client sends is what a server expects next, and what it reads is counted as what it was."""

from __future__ import annotations

import pytest

from bench.doors import DOORS, Answer, Refused, Shape, reply
from conveyor.v1 import conveyor_pb2 as pb

SHAPE = Shape("model", input_size=3, output_size=5, steps=4, chunks=2, timeout_us=1000)
FULL = pb.ErrorDetail(code=8, message="the queue is full")


def _positions(message: bytes) -> list[int]:
    request = pb.StreamRequest.FromString(message)
    return [chunk.position for chunk in request.chunks] + [at for block in request.blocks for at in block.positions]


def _answer(door: str, group: list[str], refused: set[str]) -> bytes:
    if door == "chunks":
        results = [
            pb.ChunkResult(session_id=name, error=FULL if name in refused else None, steps=0 if name in refused else 4)
            for name in group
        ]
        return bytes(pb.StreamResponse(results=results).SerializeToString())
    errors = [pb.BlockError(index=index, error=FULL) for index, name in enumerate(group) if name in refused]
    tag = 0 if group[0] == "a" else 1
    return bytes(pb.StreamResponse(block_results=[pb.BlockResult(tag=tag, steps=4, errors=errors)]).SerializeToString())


@pytest.mark.parametrize("name", ["chunks", "blocks"])
def test_positions_follow_what_was_applied(name: str) -> None:
    """A group's next message goes on behind the chunks that were applied, and says the others again."""
    door = DOORS[name](SHAPE, ["a", "b", "c"])
    assert list(door.sizes) == [2, 1]
    assert [_positions(door.message(group)) for group in (0, 1)] == [[0, 0], [0]]
    answers = list(door.read(_answer(name, ["a", "b"], refused={"b"})))
    assert sum(answer.applied for answer in answers) == 1
    assert sum(answer.refused for answer in answers) == 1
    assert {answer.group for answer in answers} == {0}
    list(door.read(_answer(name, ["c"], refused=set())))
    assert [_positions(door.message(group)) for group in (0, 1)] == [[4, 0], [4]]


@pytest.mark.parametrize("name", ["chunks", "blocks"])
def test_a_refusal_that_was_not_provoked_ends_the_run(name: str) -> None:
    """Without a time limit a chunk that is refused is an error, not something to be counted."""
    door = DOORS[name](SHAPE._replace(timeout_us=0), ["a", "b"])
    with pytest.raises(Refused, match="the queue is full"):
        list(door.read(_answer(name, ["a", "b"], refused={"a"})))


def test_a_block_of_which_nothing_was_applied_is_one_answer() -> None:
    """Where every chunk of a block has an error its group ends once, so that it is not sent on twice."""
    door = DOORS["blocks"](SHAPE, ["a", "b"])
    assert list(door.read(_answer("blocks", ["a", "b"], refused={"a", "b"}))) == [Answer(0, 0, refused=2)]
    assert _positions(door.message(0)) == [0, 0]


def test_a_block_that_is_refused_whole_is_all_its_chunks() -> None:
    """An error of the block itself counts for each of its chunks, and moves none."""
    door = DOORS["blocks"](SHAPE, ["a", "b"])
    whole = pb.StreamResponse(block_results=[pb.BlockResult(tag=0, error=FULL)])
    assert list(door.read(whole.SerializeToString())) == [Answer(0, 0, refused=2)]
    assert _positions(door.message(0)) == [0, 0]


def test_an_echo_carries_as_much_as_the_real_thing() -> None:
    """The echo's messages are those of the door that is measured, and it is asked for replies of the real length."""
    for chunks, real in ((1, "chunks"), (2, "blocks")):
        shape = SHAPE._replace(chunks=chunks, timeout_us=0)
        echo, door = DOORS["echo"](shape, ["a", "b"]), DOORS[real](shape, ["a", "b"])
        assert echo.message(0) == door.message(0)
        assert echo.sizes == door.sizes
        response = pb.StreamResponse.FromString(reply(shape, chunks, "a"))
        data = [part.outputs[0].data for part in response.results or response.block_results]
        assert [len(each) for each in data] == [chunks * 4 * 5 * 4]
        assert echo.metadata == (("reply-bytes", str(response.ByteSize())),)
