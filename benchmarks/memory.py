"""Peak memory of a call on the CPU, measured in a process of its own: python benchmarks/memory.py OP SHAPE SIDE ..."""

import ctypes
import importlib
import json
import sys

from shapes import ALL, make


def peak_bytes() -> int:
    """The largest resident size since the peak was last reset."""
    with open("/proc/self/status") as status:
        return int(next(line for line in status if line.startswith("VmHWM")).split()[1]) * 1024


def main(op: str, name: str, wanted: list[str]) -> None:
    build = importlib.import_module(f"bench_{op}").sides
    shape = ALL[name]
    small = shape._replace(batch=1, grid=(8, 8), num_anchors=6, num_background=2)
    sides, small_sides = build(shape, *make(shape)), build(small, *make(small))
    found = {}
    for side in wanted:
        small_sides[side].call()  # threads, code, allocator
        ctypes.CDLL(None).malloc_trim(0)  # else memory that stayed with the heap would serve the call
        with open("/proc/self/clear_refs", "w") as clear:
            clear.write("5")  # the peak starts anew
        before = peak_bytes()
        sides[side].call()
        found[side] = peak_bytes() - before
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
