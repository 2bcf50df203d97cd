"""Some programs of a launch in step: their registers, where each thread is, and its ways to memory."""

import numpy as np

from profiling.emulator.asynchronous import Groups
from profiling.emulator.memory import UNWRITTEN, Fault, Watch, grains_of, view
from profiling.emulator.ptx import Unsupported

WARP = 32
DONE = 1 << 40  # where a thread is that has returned
SPECIAL = ("%tid", "%ctaid", "%ntid", "%nctaid", "%laneid", "%warpid", "%clock", "%cluster")


class Apart(Fault):
    """Threads that must be together are not: a fault if nobody is left who could still come."""


def low(value: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """A register, or its low part, as `dtype`."""
    if value.dtype.itemsize != dtype.itemsize:
        value = value.view(f"u{value.dtype.itemsize}").astype(f"u{dtype.itemsize}")
    return value.view(dtype)


class Run:
    """Some programs of a launch, in step."""

    def __init__(self, machine, programs, grid, parameters, memory, counts, watched, measured):
        self.machine, self.memory, self.counts, self.measured = machine, memory, counts, measured
        self.parameters = dict(zip((name for name, _ in machine.program.parameters), parameters, strict=True))
        threads, n = machine.threads, len(programs)
        self.lanes = n * threads
        self.programs = programs
        self.warps = threads // WARP
        self.owners_each = self.warps + 2
        thread = np.tile(np.arange(threads, dtype=np.uint32), n)
        self.cta = np.repeat(np.arange(n), threads)  # the program of each lane, among these
        self.owner = programs[self.cta] * self.owners_each + thread // WARP
        self.shared_size = -(-machine.shared_bytes // 1024) * 1024 + 16
        self.shared = np.full(n * self.shared_size, UNWRITTEN, np.uint8)
        self.shared_base = self.cta * self.shared_size
        self.shared_watch = Watch(n * self.shared_size, self.owners_each) if watched else None
        self.epoch = np.zeros(n, np.int64)
        self.R: list = [None] * len(machine.numbers)
        for number, value in machine.constants:
            self.R[number] = value
        x, y, z = programs % grid[0], programs // grid[0] % grid[1], programs // (grid[0] * grid[1])
        special = {
            "%tid.x": thread, "%laneid": thread % WARP, "%warpid": thread // WARP, "%ntid.x": threads,
            "%ctaid.x": x[self.cta], "%ctaid.y": y[self.cta], "%ctaid.z": z[self.cta],
            "%nctaid.x": grid[0], "%nctaid.y": grid[1], "%nctaid.z": grid[2], "%cluster_ctarank": 0,
            "%tid.y": 0, "%tid.z": 0,
        }  # fmt: skip
        for key, number in machine.numbers.items():
            name = key.strip("'").split("'")[0]
            if name.startswith(SPECIAL):
                if name not in special:
                    raise Unsupported(f"register {name}")
                self.R[number] = np.atleast_1d(np.asarray(special[name])).astype(np.uint32)
        self.place = 0
        self.places: np.ndarray | None = None  # of each lane, while they differ
        self.parked: np.ndarray | None = None  # lanes that wait where they are for others
        self.copies, self.products = Groups(self), Groups(self)  # of cp.async and of wgmma
        self.barriers: dict = {}  # mbarriers by (program, address)
        self.spins = 0

    # ------------------------------------------------------------ control

    def go(self) -> None:
        steps, program = self.machine.steps, self.machine.program
        warps_all = self.lanes // WARP
        executed = self.counts.warps
        end = len(steps)
        with np.errstate(all="ignore"):
            while self.place < end:
                place = self.place
                guard, wanted, function = steps[place]
                mask = None if self.places is None else self.places == place
                if self.parked is not None:  # somebody has come: those who wait here try again
                    self.parked &= ~mask
                try:
                    if guard is not None:
                        held = self.R[guard] if wanted else ~self.R[guard]
                        held = held if mask is None else held & mask
                        if held.all():
                            guarded = None if mask is None else np.broadcast_to(held, self.lanes)
                        else:
                            guarded = np.broadcast_to(held, self.lanes)
                    else:
                        guarded = mask
                    target = function(self, guarded)
                except Apart as fault:
                    if not self._park(mask):
                        raise Fault(f"{program.name}: {program.instructions[place].where}: {fault}") from None
                    continue
                except Fault as fault:
                    raise Fault(f"{program.name}: {program.instructions[place].where}: {fault}") from None
                except (TypeError, AttributeError, ValueError) as error:
                    what = f"{program.name}: {program.instructions[place].where}"
                    raise Unsupported(f"{what}: {type(error).__name__}: {error}") from error
                executed[place] += warps_all if mask is None else np.count_nonzero(mask.reshape(-1, WARP).any(1))
                self._advance(place, mask, guarded, target)

    def _park(self, mask: np.ndarray | None) -> bool:
        """Let these lanes wait here and run others; False if there are none."""
        if mask is None:
            return False
        self.parked = mask if self.parked is None else self.parked | mask
        others = self.places[~self.parked]
        self.place = int(others.min()) if len(others) else DONE
        return self.place != DONE

    def _advance(self, place, mask, guarded, target) -> None:
        if self.places is None:
            if target is None:
                self.place = place + 1
                return
            if guarded is None:
                self.place = target
                return
            self.places = np.where(guarded, target, place + 1)
        elif target is None:
            self.places[mask] = place + 1
        else:
            self.places[mask] = place + 1
            self.places[guarded] = target
        if self.parked is not None and not self.parked.any():
            self.parked = None
        first = (self.places if self.parked is None else self.places[~self.parked]).min()
        if first == DONE and self.parked is not None:  # nobody can come any more
            first, self.parked = self.places.min(), None
        self.place = int(first)
        if (self.places == first).all():
            self.places = self.parked = None

    def write(self, register: int, value: np.ndarray, mask: np.ndarray | None) -> None:
        if mask is None:
            self.R[register] = value
            return
        before = self.R[register]
        if before is None:
            before = np.zeros(1, value.dtype)
        elif before.dtype != value.dtype:
            before = before.view(value.dtype)
        self.R[register] = np.where(mask, value, before)

    def full(self, register: int, dtype: np.dtype) -> np.ndarray:
        """A register with an element for each lane."""
        return np.broadcast_to(low(self.R[register], dtype), self.lanes)

    def whole_warps(self, mask: np.ndarray | None) -> np.ndarray | None:
        """The warps that are active, None for all. Raises Apart where threads of a warp are."""
        if mask is None:
            return None
        warps = mask.reshape(-1, WARP)
        if (warps.any(1) != warps.all(1)).any():
            raise Apart("threads of one warp are apart at an instruction that is one for the warp")
        return warps[:, 0]

    def barrier(self, mask: np.ndarray | None) -> None:
        if mask is not None:
            programs = mask.reshape(len(self.programs), -1)
            if (programs.any(1) & ~programs.all(1)).any():
                raise Apart("a barrier that some threads of the program are not at")
            self.epoch[programs.any(1)] += 1
        else:
            self.epoch += 1

    # ------------------------------------------------------------ memory

    def chosen(self, mask: np.ndarray | None) -> np.ndarray:
        return np.arange(self.lanes) if mask is None else np.flatnonzero(mask)

    def addresses(self, register: int, offset: int, lanes: np.ndarray) -> np.ndarray:
        value = self.R[register]
        value = value.astype(np.int64) if value.dtype.itemsize < 8 else value.view(np.int64)
        if len(value) == 1:
            return np.broadcast_to(value + offset, len(lanes))
        return value[lanes] + offset

    def watch(self, watch: Watch | None, what: str, offsets, width, lanes, engine: bool = False) -> None:
        """Note reads. Raises Fault for one that races with a write, or comes before a copy has landed."""
        if watch is None or len(lanes) == 0:
            return
        grains = grains_of(offsets, width)
        if watch.awaited(grains):
            raise Fault(f"reads {what} before the copy to it has been waited for")
        if watch.reading(grains, *self.who(lanes, engine)):
            raise Fault(f"reads {what} that another warp writes, with no barrier between")

    def who(self, lanes: np.ndarray, engine: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """(owners, epochs) of accesses by these lanes, a column each."""
        owners = self.owner[lanes]
        if engine:
            owners = owners // self.owners_each * self.owners_each + self.owners_each + Watch.ENGINE
        return owners[:, None], self.epoch[self.cta[lanes]][:, None]

    def put(
        self, watch: Watch | None, what: str, memory: np.ndarray, offsets, data: np.ndarray, lanes, engine: bool = False
    ) -> None:
        """Write (lanes, bytes) to an array. Raises Fault for a race, but for several writes of one value."""
        places = offsets[:, None] + np.arange(data.shape[1])
        if watch is None:
            memory[places] = data
            return
        grains = grains_of(offsets, data.shape[1])
        if watch.awaited(grains):
            raise Fault(f"writes {what} before the copy to it has been waited for")
        read, rewritten = watch.writing(grains, *self.who(lanes, engine))
        differs = rewritten.any() and (memory[places[rewritten]] != data[rewritten]).any()
        memory[places] = data
        if read or differs:
            raise Fault(f"writes {what} that another warp {'reads' if read else 'writes'}, with no barrier between")
        if (memory[places] != data).any():
            raise Fault(f"several threads write {what} in the same place, not the same")

    def shared_offsets(self, addresses: np.ndarray, width: int, lanes: np.ndarray) -> np.ndarray:
        """Places in the array of all programs' shared memory. Raises Fault."""
        if (addresses % width).any():
            raise Fault(f"an address in shared memory that {width} does not divide")
        if (addresses < 0).any() or (addresses + width > self.machine.shared_bytes).any():
            worst = int(addresses.max() if (addresses >= 0).all() else addresses.min())
            raise Fault(f"byte {worst} of shared memory, of which a program has {self.machine.shared_bytes}")
        return addresses + self.shared_base[lanes]

    def load(self, space: str, addresses, width, lanes) -> np.ndarray:
        """(lanes, bytes) of memory."""
        if space == "shared":
            offsets = self.shared_offsets(addresses, width, lanes)
            self.watch(self.shared_watch, "shared memory", offsets, width, lanes)
            return self.shared[offsets[:, None] + np.arange(width)]
        result = np.zeros((len(lanes), width), np.uint8)
        for region, part in self.memory.find(addresses, width):
            offsets = addresses[part] - region.start + region.lead
            self.watch(region.watch, region.name, offsets, width, lanes[part])
            units = view(region.bytes, width)
            if width == 16:
                result[part] = units.reshape(-1, 2)[offsets // 16].view(np.uint8)
            else:
                result[part] = units[offsets // width, None].view(np.uint8)
        return result

    def store(self, space: str, addresses, data: np.ndarray, lanes) -> None:
        """Write (lanes, bytes)."""
        width = data.shape[1]
        if space == "shared":
            offsets = self.shared_offsets(addresses, width, lanes)
            self.put(self.shared_watch, "shared memory", self.shared, offsets, data, lanes)
            return
        for region, part in self.memory.find(addresses, width):
            offsets = addresses[part] - region.start + region.lead
            self.put(region.watch, region.name, region.bytes, offsets, data[part], lanes[part])

    def measure(self, space: str, addresses, width, lanes) -> None:
        """Count what an access moves."""
        if not self.measured or len(lanes) == 0:
            return
        if space == "global":
            # of an instruction of one warp, a sector that several lanes want is moved once
            sectors = (lanes // WARP)[:, None] * (1 << 44) + (addresses[:, None] + np.arange(0, width, 32)) // 32
            self.counts.bytes[self.place] += width * len(lanes)
            self.counts.sectors[self.place] += len(np.unique(sectors))
            return
        # a pass serves 32 banks of 4 bytes, one word of each: wide accesses go by halves or quarters of a warp
        share = lanes // (WARP * 4 // max(width, 4))
        words = addresses[:, None] // 4 + np.arange(max(width // 4, 1))
        wanted = np.unique(share[:, None] * (1 << 24) + words)
        banks, loads = np.unique(wanted // (1 << 24) * 32 + wanted % 32, return_counts=True)
        passes = np.zeros(int(share.max()) + 1, np.int64)
        np.maximum.at(passes, banks // 32, loads)
        self.counts.passes[self.place] += int(passes.sum())
        self.counts.conflicts[self.place] += int(passes.sum() - np.count_nonzero(passes))
