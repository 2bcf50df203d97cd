"""Some programs of a launch in step: their registers, where each thread is, and its ways to memory."""

import numpy as np

from profiling.emulator.asynchronous import Groups, landed, multiplied
from profiling.emulator.memory import UNWRITTEN, Apart, Fault, grains_of, view
from profiling.emulator.order import Order, SharedWatch
from profiling.emulator.ptx import Unsupported

WARP = 32
DONE = 1 << 40  # where a thread is that has returned
SPECIAL = ("%tid", "%ctaid", "%ntid", "%nctaid", "%laneid", "%warpid", "%clock", "%cluster")


def low(value: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """A register, or its low part, as `dtype`."""
    if value.dtype.itemsize != dtype.itemsize:
        value = value.view(f"u{value.dtype.itemsize}").astype(f"u{dtype.itemsize}")
    return value.view(dtype)


class Run:
    """Some programs of a launch, in step."""

    def __init__(self, machine, programs, grid, parameters, memory, counts, watched, measured, random=None):
        self.machine, self.memory, self.counts, self.measured = machine, memory, counts, measured
        self.parameters = dict(zip((name for name, _ in machine.program.parameters), parameters, strict=True))
        threads, n = machine.threads, len(programs)
        self.lanes = n * threads
        self.programs = programs
        self.warps = threads // WARP
        self.owners_each = self.warps + 1
        thread = np.tile(np.arange(threads, dtype=np.uint32), n)
        self.cta = np.repeat(np.arange(n), threads)  # the program of each lane, among these
        self.owner = programs[self.cta] * self.owners_each + thread // WARP
        self.warp = np.arange(self.lanes) // WARP  # among those that run here
        self.shared_size = -(-machine.shared_bytes // 1024) * 1024 + 16
        self.shared = np.full(n * self.shared_size, UNWRITTEN, np.uint8)
        self.shared_base = self.cta * self.shared_size
        self.order = Order(n, self.warps)
        self.shared_watch = SharedWatch(n * self.shared_size, self.order) if watched else None
        self.epoch = np.zeros(n, np.int64)  # barriers of the whole program
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
        self.random = random  # a generator that chooses who runs next; None: those at the earliest instruction
        self.place = 0
        self.places: np.ndarray | None = None  # of each lane, while they differ
        self.parked: np.ndarray | None = None  # lanes that wait where they are for others
        self.copies, self.products = Groups(self, landed), Groups(self, multiplied)  # of cp.async and of wgmma
        self.barriers: dict = {}  # mbarriers by (program, address)
        self.idle = 0  # how often somebody has begun to wait since anything else happened

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
                    if not self._park(place, mask, fault.waiting):
                        raise Fault(f"{program.name}: {program.instructions[place].where}: {fault}") from None
                    continue
                except Fault as fault:
                    raise Fault(f"{program.name}: {program.instructions[place].where}: {fault}") from None
                except (TypeError, AttributeError, ValueError) as error:
                    what = f"{program.name}: {program.instructions[place].where}"
                    raise Unsupported(f"{what}: {type(error).__name__}: {error}") from error
                executed[place] += warps_all if mask is None else np.count_nonzero(mask.reshape(-1, WARP).any(1))
                self.idle = 0
                self._advance(place, mask, guarded, target)
            try:
                self.products.wait(None, -1)
            except Fault as fault:
                raise Fault(f"{program.name}: at its end: {fault}") from None

    def _park(self, place: int, mask: np.ndarray | None, waiting: np.ndarray | None) -> bool:
        """Let these lanes wait here, those of `mask` beside them go on, and run others; False if none can move."""
        if self.places is None:
            self.places = np.full(self.lanes, place)
            mask = np.ones(self.lanes, bool)
        waiting = mask if waiting is None else waiting
        going = mask & ~waiting
        if going.any():
            self.idle = 0
            self.places[going] = place + 1
            self.counts.warps[place] += np.count_nonzero(going.reshape(-1, WARP).any(1))
        self.parked = waiting.copy() if self.parked is None else self.parked | waiting
        groups = len(np.unique(self.places[self.parked]))
        self.idle += 1
        return self._choose() or self.idle <= 2 * groups

    def _advance(self, place, mask, guarded, target) -> None:
        if self.places is None:
            if target is None:
                self.place = place + 1
                return
            if guarded is None and not isinstance(target, np.ndarray):
                self.place = target
                return
            self.places = np.where(True if guarded is None else guarded, target, place + 1)
        elif target is None:
            self.places[mask] = place + 1
        else:
            self.places[mask] = place + 1
            self.places[guarded] = target[guarded] if isinstance(target, np.ndarray) else target
        self._choose()

    def _choose(self) -> bool:
        """Let some run who do not wait; if all do, all try again, and this is False."""
        some = True
        if self.parked is not None and not self.parked.any():
            self.parked = None
        free = self.places if self.parked is None else self.places[~self.parked]
        if free.min(initial=DONE) == DONE and self.parked is not None:  # nobody can come any more
            free, self.parked, some = self.places, None, False
        chosen = free.min()
        if self.random is not None and chosen != DONE:
            chosen = self.random.choice(np.unique(free[free != DONE]))
        self.place = int(chosen)
        if (self.places == chosen).all():
            self.places = self.parked = None
        return some

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

    def barrier(self, mask: np.ndarray | None, name: int, threads: int) -> None:
        """A barrier of so many threads of each program, who may be at different instructions of that name."""
        if mask is None and threads == self.machine.threads:
            self.order.meet_all()
            self.epoch += 1
            return
        here = np.ones(self.lanes, bool) if mask is None else mask
        come = here
        if self.places is not None:
            waiting = np.zeros(self.lanes, bool) if self.parked is None else self.parked
            come = here | waiting & (self.machine.barriers[np.minimum(self.places, len(self.machine.steps))] == name)
            warps = np.where(here, self.place, self.places).reshape(-1, WARP)
            come = come & np.repeat((warps == warps[:, :1]).all(1), WARP)  # a warp comes as a whole
        present = come.reshape(len(self.programs), -1)
        complete = present.sum(1) == threads
        if (present.sum(1) > threads).any():
            raise Fault(f"more threads at a barrier than the {threads} that it is for")
        for program in np.flatnonzero(complete & here.reshape(len(self.programs), -1).any(1)):
            self.order.meet(program * self.warps + np.flatnonzero(present[program].reshape(-1, WARP).any(1)))
            self.epoch[program] += threads == self.machine.threads
        elsewhere = come & ~here & complete[self.cta]
        if elsewhere.any():
            np.add.at(self.counts.warps, self.places[elsewhere].reshape(-1)[::WARP], 1)
            self.places[elsewhere] += 1
            self.parked &= ~elsewhere
        late = here & ~(come & complete[self.cta])
        if late.any():
            raise Apart("a barrier that some threads of the program are not at", late)

    # ------------------------------------------------------------ memory

    def chosen(self, mask: np.ndarray | None) -> np.ndarray:
        return np.arange(self.lanes) if mask is None else np.flatnonzero(mask)

    def addresses(self, register: int, offset: int, lanes: np.ndarray) -> np.ndarray:
        value = self.R[register]
        value = value.astype(np.int64) if value.dtype.itemsize < 8 else value.view(np.int64)
        if len(value) == 1:
            return np.broadcast_to(value + offset, len(lanes))
        return value[lanes] + offset

    def note_reads(self, region, offsets, width, lanes) -> None:
        """Raises Fault for one that races with a write, or comes before a copy has landed; None is shared memory."""
        watch = self.shared_watch if region is None else region.watch
        if watch is None or len(lanes) == 0:
            return
        grains = grains_of(offsets, width)
        if region is None:
            if watch.awaited(grains):
                raise Fault("reads shared memory before the copy to it has been waited for")
            raced = watch.reading(grains, self.warp[lanes])
        else:
            raced = watch.reading(grains, *self.who(lanes))
        if raced:
            what = "shared memory" if region is None else region.name
            raise Fault(f"reads {what} that another warp writes, with no barrier between")

    def who(self, lanes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(owners, epochs) of accesses by these lanes, a column each."""
        return self.owner[lanes][:, None], self.epoch[self.cta[lanes]][:, None]

    def put(self, region, offsets, data: np.ndarray, lanes, engine: bool = False) -> None:
        """Write (lanes, bytes), to shared memory if the region is None, `engine`: for the one that copies.

        Raises Fault for a race, but for several writes of one value.
        """
        watch, memory = (self.shared_watch, self.shared) if region is None else (region.watch, region.bytes)
        what = "shared memory" if region is None else region.name
        places = offsets[:, None] + np.arange(data.shape[1])
        if watch is None:
            memory[places] = data
            return
        grains = grains_of(offsets, data.shape[1])
        if region is None:
            if watch.awaited(grains):
                raise Fault("writes shared memory before the copy to it has been waited for")
            read, rewritten = watch.writing(grains, self.warp[lanes], engine)
        else:
            read, rewritten = watch.writing(grains, *self.who(lanes))
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
            self.note_reads(None, offsets, width, lanes)
            return self.shared[offsets[:, None] + np.arange(width)]
        result = np.zeros((len(lanes), width), np.uint8)
        for region, part in self.memory.find(addresses, width):
            offsets = addresses[part] - region.start + region.lead
            self.note_reads(region, offsets, width, lanes[part])
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
            self.put(None, offsets, data, lanes)
            return
        for region, part in self.memory.find(addresses, width):
            offsets = addresses[part] - region.start + region.lead
            self.put(region, offsets, data[part], lanes[part])

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
