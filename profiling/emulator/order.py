"""What comes before what in a program: a clock of its own for each warp, and what each knows of the others'.

A warp's time goes on when it tells others how far it is, at a barrier or by arriving at an mbarrier; whoever waits
there knows all that those who came knew (Lamport's happened-before, kept as vector clocks). The engine that copies
beside the threads has a clock too, of the copies that have landed.

Fidge, "Timestamps in message-passing systems that preserve the partial ordering" (1988).
"""

import numpy as np

from profiling.emulator.memory import GRAIN, grains_of


class Order:
    """The clocks of some programs. `known[warp, other]`: how much of the other's time is before what the warp does."""

    def __init__(self, programs: int, warps: int):
        self.warps = warps
        self.time = np.ones(programs * warps, np.int64)
        self.known = np.zeros((programs * warps, warps + 1), np.int64)
        self.landed = np.zeros(programs, np.int64)  # the engine's time

    def tell(self, warp: int) -> np.ndarray:
        """What somebody learns who waits for this warp here; what the warp does from now on is later."""
        told = self.known[warp].copy()
        told[warp % self.warps] = self.time[warp]
        self.time[warp] += 1
        return told

    def learn(self, warp: int, told: np.ndarray) -> None:
        np.maximum(self.known[warp], told, out=self.known[warp])

    def meet(self, warps: np.ndarray) -> None:
        """A barrier of these warps of one program."""
        told = np.max([self.tell(warp) for warp in warps], 0)
        self.known[warps] = told

    def meet_all(self) -> None:
        """A barrier of all warps of every program."""
        programs, warps = len(self.landed), self.warps
        known = self.known.reshape(programs, warps, warps + 1)
        told = known.max(1)
        told[:, :warps] = self.time.reshape(programs, warps)
        known[:] = told[:, None]
        self.time += 1


class SharedWatch:
    """Who wrote each grain of shared memory last, and when each warp of its program read it last.

    A warp here is its number among those of all programs; `program * warps + warp`.
    """

    def __init__(self, size: int, order: Order):
        grains = -(-size // GRAIN)
        self.order, self.warps = order, order.warps
        self.writer = np.full(grains, -1, np.int16)
        self.written = np.zeros(grains, np.int64)
        self.read = np.zeros((grains, self.warps), np.int64)
        self.serial = np.zeros(grains, np.int64)  # the number of the last write
        self.writes = 0
        self.flying: np.ndarray | None = None  # what copies are still to write

    def _unordered(self, grains, warps):
        """Where nothing orders what these warps do after the last write."""
        before = self.writer[grains]
        mine = before == (warps % self.warps)[:, None]
        return (before >= 0) & ~mine & (self.written[grains] > self.order.known[warps[:, None], before])

    def reading(self, grains: np.ndarray, warps: np.ndarray) -> bool:
        """Note reads; whether one races with a write."""
        raced = self._unordered(grains, warps).any()
        self.read[grains, (warps % self.warps)[:, None]] = self.order.time[warps][:, None]
        return bool(raced)

    def writing(self, grains: np.ndarray, warps: np.ndarray, engine: bool = False) -> tuple[bool, np.ndarray]:
        """Note writes, by the engine for these warps or by themselves; whether one races with a read, and which (a
        row each) with other writes."""
        rewritten = self._unordered(grains, warps)
        later = self.read[grains] > self.order.known[warps, : self.warps][:, None, :]
        later[np.arange(len(warps)), :, warps % self.warps] = False
        self.writes += 1
        self.serial[grains] = self.writes
        self.writer[grains] = self.warps if engine else (warps % self.warps)[:, None]
        self.written[grains] = np.iinfo(np.int64).max if engine else self.order.time[warps][:, None]
        return bool(later.any()), rewritten.any(1)

    def rewritten_since(self, grains: np.ndarray, serials: np.ndarray) -> bool:
        """Whether somebody has written here after so many writes."""
        return bool((self.serial[grains] > serials[:, None]).any())

    def begin(self, offsets: np.ndarray, width: int) -> None:
        """A copy to here has begun: until `land` nobody may read or write the place."""
        if self.flying is None:
            self.flying = np.zeros(len(self.writer), bool)
        self.flying[grains_of(offsets, width)] = True

    def land(self, offsets: np.ndarray, width: int) -> None:
        """That copy is there."""
        self.flying[grains_of(offsets, width)] = False

    def delivered(self, offsets: np.ndarray, width: int, time: int) -> None:
        """The engine's copy is there: for whoever knows this much of the engine's time."""
        self.land(offsets, width)
        self.written[grains_of(offsets, width)] = time

    def awaited(self, grains: np.ndarray) -> bool:
        """Whether a copy is still to write one of these grains."""
        return self.flying is not None and bool(self.flying[grains].any())
