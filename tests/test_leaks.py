"""No call leaves memory behind: of every declared operator, with all of its arguments, by the C library's own count."""

import ctypes
import gc

import pytest
import torch

from condense_kernels._dispatch.declaration import OPERATORS

CALLS = 500


class Mallinfo2(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "top",
        )
    ]


def bytes_in_use() -> int:
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallinfo2"):
        pytest.skip("counts by mallinfo2, which is glibc's since 2.33")
    libc.mallinfo2.restype = Mallinfo2
    found = libc.mallinfo2()
    return found.uordblks + found.hblkhd


@pytest.mark.parametrize("operator", OPERATORS.values(), ids=OPERATORS.keys())
def test_a_call_leaves_nothing(operator, cpp):
    """torch's conversion of a string did: of each call of an operator that takes a word."""
    torch.manual_seed(0)
    function, examples = getattr(torch.ops.condense, operator.name), operator.examples(1)

    def run(calls: int) -> int:
        for i in range(calls):
            args, kwargs = examples[i % len(examples)]
            function(*args, **kwargs)
        gc.collect()
        return bytes_in_use()

    before = run(CALLS)
    assert run(CALLS) - before < 4 * CALLS  # the least that a leak of each call takes is 16 bytes
