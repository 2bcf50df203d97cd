"""A GPU made of NumPy: the PTX that Triton compiles for sm_80, sm_89 and sm_90, run on the CPU, every access checked.

To be read in this order:

1. ptx.py: PTX as text, into instructions.
2. machine.py: a program of instructions, made into functions of NumPy arrays, and a launch of it; what is counted.
3. execution.py: some programs in step: registers, where each thread is and whom it waits for, the ways to memory.
4. memory.py: tensors, their bounds, and who wrote and read what (races); order.py: the same for shared memory, where
   barriers and mbarriers of some warps order those warps alone.
5. conversions.py (types), arithmetic.py, instructions.py, asynchronous.py (copies, mbarriers), tma.py, matrix.py:
   the instructions.
6. driver.py: Triton made to launch here; `emulate()` is the door.

What stops a kernel is a Fault: an address outside of every tensor or of the program's shared memory, or misaligned;
accesses to one place by two warps with no barrier between, or by two programs, one of them a write; a barrier, or an
instruction of whole warps, that some threads are not at; what a copy is to bring, read before it was waited for; an
mbarrier that nothing completes. PTX that is not known is Unsupported, before anything runs.

Not modelled:

- time, caches, occupancy; ptxas, its scheduling, its allocation of registers and its own faults: what runs is PTX.
- memory reordered between threads without a barrier, and what fences (also those between the proxies of threads and
  of the TMA unit) are for: a fence does nothing here, so one that is missing is not missed.
- other orders of warps than the one that runs: those at the earliest instruction, until they wait, or with a seed
  whoever chance takes at every instruction. Races are seen whatever the order; a deadlock may need another.
- whose copy an mbarrier brought: who has waited for a later copy counts as knowing the earlier ones of its program.
- threads of one warp that run ahead of each other: between them no race is seen.
- products of wgmma under way: results are there at once, and reading an accumulator too early is not noticed.
- the rounding inside tensor cores (products are exact and summed in fp32) and of approximate instructions (here the
  nearest number), NaN's payload, and atomics, which the kernels do not use.
- tcgen05 (sm_100) and AMD's GPUs.
"""
