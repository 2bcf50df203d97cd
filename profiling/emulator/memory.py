"""Memory whose every access is checked: its bounds, its alignment, and whether another thread may race with it.

Two accesses to the same bytes race if one of them writes and nothing orders them: within a program a barrier does,
between the programs of a launch nothing. Threads of one warp are taken to be in step.
"""

from dataclasses import dataclass

import numpy as np

GRAIN = 2
"""Bytes that are watched together for races."""
WATCHED = 1 << 28
"""Bytes of a tensor above which nobody watches: 16 bytes are kept for each grain."""
UNWRITTEN = 0xFF
"""What shared memory is filled with: NaN in bf16, fp16 and fp32."""


class Fault(Exception):
    """What a kernel did that a GPU forbids or leaves undefined."""


class Apart(Fault):
    """Threads must wait for others: a fault if nobody is left who could still come. `waiting`: which, None for all."""

    def __init__(self, message: str, waiting: np.ndarray | None = None):
        super().__init__(message)
        self.waiting = waiting


class Watch:
    """Who wrote and who read each grain last, and in which epoch: how many barriers its program had passed.

    For global memory; shared memory's is in order.py. An owner is `program * owners + warp`. One more of each program
    is no warp: SEVERAL, who race with every warp. ALL, several programs, race with everyone.
    """

    SEVERAL = -1
    ALL = 1 << 60

    def __init__(self, size: int, owners: int):
        grains = -(-size // GRAIN)
        self.owners = owners
        self.writer = np.full(grains, -1, np.int64)
        self.written = np.zeros(grains, np.int64)
        self.reader = np.full(grains, -1, np.int64)
        self.read = np.zeros(grains, np.int64)

    def _unordered(self, owners, epochs, before, then):
        """Where nothing orders this access after the one by `before` in epoch `then`."""
        same_program = before // self.owners == owners // self.owners
        return (before >= 0) & (before != owners) & (~same_program | (then == epochs))

    def reading(self, grains, owners, epochs) -> bool:
        """Note reads; whether one races with a write."""
        raced = self._unordered(owners, epochs, self.writer[grains], self.written[grains]).any()
        several = owners // self.owners * self.owners + self.owners + self.SEVERAL
        before, then = self.reader[grains], self.read[grains]
        foreign = (before >= 0) & (before // self.owners != owners // self.owners)
        mixed = (before >= 0) & (before != owners) & (then == epochs)
        readers = np.where(foreign, self.ALL, np.where(mixed, several, owners))
        self.reader[grains] = readers
        others = self.reader[grains]  # of several lanes that read one grain now, the last is noted
        if (others != readers).any():
            foreign = others // self.owners != readers // self.owners
            self.reader[grains[others != readers]] = np.where(foreign, self.ALL, several)[others != readers]
        self.read[grains] = epochs
        return bool(raced)

    def writing(self, grains, owners, epochs) -> tuple[bool, np.ndarray]:
        """Note writes; whether one races with a read, and which (a row each) with other writes."""
        rewritten = self._unordered(owners, epochs, self.writer[grains], self.written[grains])
        read = self._unordered(owners, epochs, self.reader[grains], self.read[grains]).any()
        self.writer[grains], self.written[grains] = owners, epochs
        return bool(read), rewritten.any(1)


def grains_of(offsets: np.ndarray, width: int) -> np.ndarray:
    """(accesses, grains of each) of accesses of `width` bytes."""
    return offsets[:, None] // GRAIN + np.arange(max(width // GRAIN, 1))


@dataclass
class Region:
    """Memory that a kernel may touch: a tensor's bytes, from its first element to its last."""

    name: str
    start: int
    size: int
    bytes: np.ndarray  # all whole units of 16 bytes that hold it, as uint8; bytes[lead] is the first of the region
    lead: int
    watch: Watch | None = None


class Global:
    """Global memory: the regions of one launch."""

    def __init__(self, regions: list[Region], owners: int = 0):
        self.regions = sorted(regions, key=lambda region: region.start)
        self.starts = np.array([region.start for region in self.regions], np.int64)
        for region in self.regions:
            if owners and region.size <= WATCHED:
                region.watch = Watch(region.size + region.lead, owners)

    def find(self, addresses: np.ndarray, width: int) -> list[tuple[Region, np.ndarray]]:
        """(region, places in `addresses` that lie in it) of accesses of `width` bytes. Raises Fault."""
        if len(addresses) == 0:
            return []
        if (addresses % width).any():
            place = int(np.flatnonzero(addresses % width)[0])
            raise Fault(f"an address that {width} does not divide: {self.describe(int(addresses[place]))}")
        owner = np.searchsorted(self.starts, addresses, side="right") - 1
        first = owner[0]
        groups = [(first, None)] if (owner == first).all() else [(one, owner == one) for one in np.unique(owner)]
        found = []
        for one, mask in groups:
            chosen = np.arange(len(addresses)) if mask is None else np.flatnonzero(mask)
            region = self.regions[one] if one >= 0 else None
            taken = addresses[chosen]
            outside = taken if region is None else taken[taken + width > region.start + region.size]
            if len(outside):
                raise Fault(f"{width} bytes outside of every tensor: {self.describe(int(outside[0]))}")
            found.append((region, chosen))
        return found

    def describe(self, address: int) -> str:
        """An address in words, from the tensor that begins before it."""
        before = [region for region in self.regions if region.start <= address]
        region = before[-1] if before else self.regions[0] if self.regions else None
        if region is None:
            return f"address {address:#x}, no tensor"
        return f"byte {address - region.start} of {region.name}, which has {region.size}"


def view(memory: np.ndarray, width: int) -> np.ndarray:
    """Bytes as units of `width` bytes: a width of 16 gives two columns of 8."""
    usable = memory[: len(memory) // width * width]
    return usable.view({1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64, 16: np.uint64}[width])
