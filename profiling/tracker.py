"""Every allocation of a computation, real or under fake tensors, and the timeline of memory that they make.

A storage is seen when the first op returns it and until it is freed, through PyTorch's dispatcher: that misses what an
op allocates and frees inside itself. For the ops of this project the inside is looked at as well, see `inside`.
"""

import contextlib
import dataclasses
import math
import weakref
from collections.abc import Callable, Iterator

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

CATEGORIES = ("parameters", "gradients", "optimizer state", "batch and buffers", "activations", "temporaries")
"""Where a byte can belong. Activations: made in forward, alive at its end. Temporaries: everything else."""


# What autograd does in place to a tensor that it alone holds: adding up where gradients meet, scattering into zeros.
# Not so under a dispatch mode, where the result is a new tensor and the old one is freed at once: it takes its place.
_IN_PLACE = ("aten.add.Tensor", "aten.scatter_add.default")


@dataclasses.dataclass(eq=False)
class Block:
    """One storage: `bytes` as an allocator hands them out, alive from tick `born` up to, not including, tick `died`."""

    bytes: int
    category: str
    phase: str
    op: str
    shape: tuple[int, ...]
    dtype: str
    born: int
    died: int | None = None


@dataclasses.dataclass(frozen=True)
class Point:
    """Memory after one allocation or after a phase's end; bytes by category."""

    phase: str
    op: str
    bytes: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.bytes.values())


class Tracker(TorchDispatchMode):
    """Records the storages that are made while it is active, and those given to `hold`.

    `granularity`: sizes are rounded up to multiples of so many bytes, as PyTorch's CUDA allocator does with 512.
    `workspace(op, args, kwargs)` gives the most bytes that an op holds at a time of what it allocates itself, its
    results included, or None for an op that is not looked into.
    """

    def __init__(self, granularity: int = 1, workspace: Callable[..., int | None] | None = None):
        super().__init__()
        self.granularity = granularity
        self.workspace = workspace
        self.blocks: list[Block] = []
        self.ops: list[str] = []
        self.phase = "before"
        self.live = 0  # bytes; kept on its own, as a check of what the blocks add up to
        self.highest = 0
        self._tick = 0
        self._known: dict[int, tuple[weakref.ref, Block]] = {}
        self._phases: list[tuple[str, int, int]] = []  # name, first and last tick
        self._sums: list[tuple[Block, Block]] = []

    # ---------------------------------------------------------------- recording

    @contextlib.contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Attribute what happens inside to `phase`; its end is a point of the timeline."""
        before, self.phase = self.phase, phase
        first = self._tick + 1
        try:
            yield
        finally:
            self._tick += 1
            self._phases.append((phase, first, self._tick))
            self.phase = before

    def hold(self, tensor: torch.Tensor, category: str) -> None:
        """Say what category a tensor's storage belongs to, whenever it was made."""
        self._see(tensor, "made before").category = category

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = str(func)
        inside = self.workspace(func, args, kwargs) if self.workspace else None
        result = func(*args, **kwargs)
        if not name.startswith("prim."):
            self.ops.append(name)
        outputs = [tensor for tensor in tree_leaves(result) if isinstance(tensor, torch.Tensor)]
        before = len(self.blocks)
        self._tick += 1
        blocks = [self._see(tensor, name) for tensor in outputs]
        made = self.blocks[before:]
        if inside is not None and (extra := self._rounded(inside) - sum(block.bytes for block in made)) > 0:
            self.blocks.append(Block(extra, "", self.phase, f"inside {name}", (), "", self._tick, self._tick + 1))
            self.highest = max(self.highest, self.live + extra)
        if name in _IN_PLACE and self.phase == "backward" and made:
            self._sums.append((self._see(args[0], name), blocks[0]))
        return result

    def _rounded(self, size: int) -> int:
        return -(-size // self.granularity) * self.granularity

    def _see(self, tensor: torch.Tensor, op: str) -> Block:
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self._known and self._known[key][0]() is storage:
            return self._known[key][1]
        size = self._rounded(storage.nbytes())
        block = Block(size, "", self.phase, op, tuple(tensor.shape), str(tensor.dtype)[6:], self._tick)
        self.blocks.append(block)
        self.live += size
        self.highest = max(self.highest, self.live)
        self._known[key] = (weakref.ref(storage, lambda _: self._forget(key, block)), block)
        return block

    def _forget(self, key: int, block: Block) -> None:
        block.died = self._tick + 1
        self.live -= block.bytes
        if key in self._known and self._known[key][1] is block:
            del self._known[key]

    # ---------------------------------------------------------------- what it comes to

    def finish(self) -> None:
        """Give every block its category. Call it once, when the step is over."""
        ends = [last for phase, _, last in self._phases if phase == "forward"]
        for block in self.blocks:
            if not block.category:
                end = next((end for end in ends if end >= block.born), math.inf)
                kept = block.phase == "forward" and (block.died is None or block.died > end)
                block.category = "activations" if kept else "temporaries"
        for old, new in self._sums:
            if old.died == new.born + 1 and old.bytes == new.bytes:
                old.died = new.born

    def timeline(self) -> list[Point]:
        """Memory at every tick of the phases, in order."""
        size = self._tick + 2
        changes: list[dict[str, int]] = [{} for _ in range(size)]
        for block in self.blocks:
            for tick, sign in ((block.born, 1), (size - 1 if block.died is None else block.died, -1)):
                changes[min(tick, size - 1)].setdefault(block.category, 0)
                changes[min(tick, size - 1)][block.category] += sign * block.bytes
        names = {block.born: block.op for block in self.blocks}
        phases = {tick: phase for phase, first, last in self._phases for tick in range(first, last + 1)}
        now, points = dict.fromkeys(CATEGORIES, 0), []
        for tick, change in enumerate(changes[:-1]):
            for category, amount in change.items():
                now[category] += amount
            if tick in phases and (change or not points or points[-1].phase != phases[tick]):
                points.append(Point(phases[tick], names.get(tick, ""), dict(now)))
        return points

    def alive_at_peak(self) -> list[Block]:
        """The blocks alive when memory was highest in any phase, the largest first."""
        ticks = [tick for _, first, last in self._phases for tick in range(first, last + 1)]
        total, changes = 0, [0] * (self._tick + 3)
        for block in self.blocks:
            changes[block.born] += block.bytes
            if block.died is not None:
                changes[block.died] -= block.bytes
        totals = []
        for change in changes:
            total += change
            totals.append(total)
        peak = max(ticks, key=lambda tick: totals[tick])
        alive = [block for block in self.blocks if block.born <= peak and (block.died is None or block.died > peak)]
        return sorted(alive, key=lambda block: -block.bytes)


# ---------------------------------------------------------------- inside an op


class _OnCuda(torch.Tensor):
    """A meta tensor that says it is on a GPU, and so do the tensors made from it: ops choose by that."""

    is_cuda = property(lambda self: True)


# Products with a result of another dtype, which PyTorch has on CUDA alone.
_WIDENING = ("mm", "bmm", "addmm", "baddbmm")


class _Inside(TorchDispatchMode):
    """The most bytes alive at a time of what is allocated while it is active."""

    def __init__(self, granularity: int):
        super().__init__()
        self.granularity = granularity
        self.live = self.most = 0
        self._seen: dict[int, weakref.ref] = {}

    def given(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        self._seen[id(storage)] = weakref.ref(storage)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func._overloadname == "dtype_out" and func._opname in _WIDENING:
            result = kwargs["out"]
        else:
            result = func(*args, **kwargs)
        for tensor in tree_leaves(result):
            if not isinstance(tensor, torch.Tensor):
                continue
            storage = tensor.untyped_storage()
            key = id(storage)
            if key in self._seen and self._seen[key]() is storage:
                continue
            size = -(-storage.nbytes() // self.granularity) * self.granularity
            self.live += size
            self.most = max(self.most, self.live)
            self._seen[key] = weakref.ref(storage, lambda _, size=size: self._freed(size))
        return result

    def _freed(self, size: int) -> None:
        self.live -= size


class Workspaces:
    """What the ops of this project allocate inside, found by running their Python on meta tensors.

    `device` is the kernels.device.Device that they are planned for: nothing is launched. Where it is a GPU the tensors
    say so (`is_cuda`). An op that cannot be run that way is counted by its results alone, and `unseen` says so, by the
    op's name.
    """

    def __init__(self, device, granularity: int = 1):
        self.device = device
        self.granularity = granularity
        self.unseen: dict[str, str] = {}
        self._cache: dict = {}

    def __call__(self, func, args, kwargs) -> int | None:
        if getattr(func, "namespace", "") != "kernels":
            return None
        leaves = tree_leaves((args, kwargs))
        key = (str(func), *(_key(leaf) for leaf in leaves))
        if key not in self._cache:
            self._cache[key] = self._run(func, args, kwargs)
        return self._cache[key]

    def _run(self, func, args, kwargs) -> int | None:
        from kernels.op import IMPLEMENTATIONS, plan_only

        name = func.name()
        function = IMPLEMENTATIONS[func._opname]
        with _disable_current_modes(), torch.no_grad(), plan_only(self.device):
            storages: dict[int, torch.Tensor] = {}
            kind = torch.Tensor if self.device.arch == "interpreter" else _OnCuda
            meta = lambda tensor: _as_meta(tensor, storages).as_subclass(kind)  # noqa: E731
            args, kwargs = tree_map_only(torch.Tensor, meta, (args, kwargs))
            with _Inside(self.granularity) as inside:
                for tensor in tree_leaves((args, kwargs)):
                    if isinstance(tensor, torch.Tensor):
                        inside.given(tensor)
                try:
                    result = function(*args, **kwargs)
                except Exception as error:  # whatever an op raises on meta tensors, its results still count
                    self.unseen[name] = f"{type(error).__name__}: {error}".split("\n")[0]
                    return None
                del result
        return inside.most


def _as_meta(tensor: torch.Tensor, storages: dict[int, torch.Tensor]) -> torch.Tensor:
    """`tensor`'s shape and strides on the meta device; tensors of one storage share one there."""
    storage = tensor.untyped_storage()
    base = storages.setdefault(id(storage), torch.empty(storage.nbytes(), dtype=torch.uint8, device="meta"))
    empty = torch.empty(0, dtype=tensor.dtype, device="meta")
    return empty.set_(base.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())


def _key(leaf):
    if isinstance(leaf, torch.Tensor):
        return tuple(leaf.shape), leaf.stride(), leaf.dtype, leaf.storage_offset()
    return leaf
