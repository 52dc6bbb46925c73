"""Runs compiled Triton kernels without a GPU: PTX, executed and checked on the CPU.

``program.py`` reads a kernel's PTX, ``encoding.py`` encodes its instructions, ``engine.py`` compiles and loads what
executes them, in C++: a CTA at a time, its warps in turns, in an order that a seed decides.

    instructions.cpp    the table of instructions; arithmetic.h, lanewise.h, collectives.h, flow.h are what they do
    accesses.cpp        loads, stores, atomics, copies
    tensor_cores.cpp    matrix products
    memory.cpp          bounds, races, what is uninitialised
    warp.h              registers, lanes that diverge
    scheduler.cpp       CTAs, warps, barriers; what Python calls

Not covered: TMA, mbarrier, clusters, tcgen05; memory that is ordered more weakly than the program (fences do nothing, a
missing one goes unnoticed); what ptxas makes of the PTX; time.
"""
