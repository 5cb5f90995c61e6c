"""Address space that costs memory where it is written, on the real system."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from service.manifest import StateSpec
from service.states import memory
from service.states.memory import PAGE_BYTES, Reserved
from service.states.pool import Pool

linux = pytest.mark.skipif(sys.platform != "linux", reason="memory is given back on Linux alone")


def resident_bytes() -> int:
    """Memory of this process that no file is behind."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) << 10


@linux
def test_what_is_not_written_costs_nothing() -> None:
    """More than the machine has can be reserved, and a part of it used and given back."""
    before = resident_bytes()
    reserved = Reserved(1 << 40)
    assert resident_bytes() - before < 1 << 20
    reserved.bytes[1 << 39 : (1 << 39) + (64 << 20)] = 1
    assert resident_bytes() - before > 60 << 20
    reserved.give_back(1 << 39, (1 << 39) + (64 << 20))
    assert resident_bytes() - before < 4 << 20


@linux
@pytest.mark.parametrize(("start", "stop"), [(1, 4), (0, 3), (1.5, 3.5), (1.5, 1.9), (2.1, 3), (2, 2)])
def test_only_whole_pages_go(start: float, stop: float) -> None:
    """What lies beside them, on a page of which a part was not meant, keeps its values."""
    reserved = Reserved(4 * PAGE_BYTES)
    assert not reserved.bytes.any()
    reserved.bytes[:] = 1
    reserved.give_back(int(start * PAGE_BYTES), int(stop * PAGE_BYTES))
    gone = [not page.any() for page in np.split(reserved.bytes, 4)]
    assert gone == [start <= page and page + 1 <= stop for page in range(4)]
    assert all(page.all() or not page.any() for page in np.split(reserved.bytes, 4))


@pytest.fixture(params=["this system", "another"])
def any_system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """This system, and one whose memory is not given back."""
    if request.param == "another":
        monkeypatch.setattr(memory, "_LINUX", False)


@pytest.mark.usefixtures("any_system")
def test_what_cannot_be_reserved() -> None:
    """The error says how much it was."""
    for size in (1 << 62, 1 << 70):
        with pytest.raises(MemoryError, match=f"cannot reserve {size} bytes"):
            Reserved(size)


@pytest.mark.usefixtures("any_system")
def test_pools_on_any_system() -> None:
    """Slots are taken, used and given back; what was left in them is not seen again."""
    spec = StateSpec(name="h", input="h0", output="hT", dtype="float32", shape=(2, None, 256), batch_axis=1)
    pool = Pool([spec], 5000)
    for value in (1, 2):
        slots = pool.allocate_many(5000)
        assert not pool.gather(slots)[0].any()
        pool.scatter(slots, np.arange(5000), [np.full((2, 5000, 256), value, np.float32)])
        pool.free_many(slots[100:])
        assert (pool.gather(slots[:100])[0] == value).all()
        pool.free_many(slots[:100])


def test_arrays_outlive_what_reserved_them() -> None:
    """Their memory stays as long as they do."""
    array = Reserved(PAGE_BYTES).bytes.view(np.float32)
    array[:] = 3
    assert (array == 3).all()
