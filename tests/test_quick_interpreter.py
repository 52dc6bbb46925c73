"""The interpreter as conftest.py quickens it beside Triton's own, which a process has that pytest did not start."""

import hashlib

import pytest
import torch
import triton
from processes import fresh
from quick_interpreter import VERSIONS

from condense_kernels._dispatch import backends

if not backends.triton_interprets() or not triton.__version__.startswith(VERSIONS):
    pytest.skip("of the interpreter alone, in versions that are known", allow_module_level=True)


def digests() -> tuple[str, bool, list[str]]:
    """Whose interpreter it is, whether launches leave triton.language as it was, and the bits that they return."""
    import triton.language as tl
    from triton.runtime import interpreter

    from condense_kernels import attention_scores
    from condense_kernels._triton.tables import FusedConfig, trying
    from condense_kernels.testing import make_inputs

    torch.manual_seed(0)
    found = []
    for kind, dtype in (("masked", torch.float32), ("magnitudes", torch.bfloat16), ("clustered", torch.float16)):
        inputs = make_inputs(kind, batch=1, num_tokens=30, channels=24, dtype=dtype, num_anchors=4, num_background=3)
        for store_s in (True, False):
            with trying(FusedConfig, store_s=store_s):
                found.append(inputs.run("triton"))
        heads = torch.randn(2, 1, 2, 30, 24).to(dtype)
        found.append((attention_scores(*heads, backend="triton"),))
    bits = [b"".join(x.contiguous().flatten().view(torch.uint8).numpy().tobytes() for x in result) for result in found]
    as_before = all(tl.core.is_builtin(place.load) for place in (tl, tl.core))
    return interpreter._patch_lang.__module__, as_before, [hashlib.sha256(one).hexdigest() for one in bits]


def test_results_have_the_same_bits():
    quick, plain = digests(), fresh(digests)
    assert (quick[0], plain[0]) == ("quick_interpreter", "triton.runtime.interpreter")
    assert quick[1]
    assert len(plain[2]) == 9 and quick[2] == plain[2]
