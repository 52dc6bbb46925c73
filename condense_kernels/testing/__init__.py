"""For tests, ours and those of libraries that embed us: inputs of named kinds, and the comparison with the reference.

    inputs = make_inputs("ties", num_tokens=24)
    assert_matches_reference(inputs.run("cpp"), inputs, backend="cpp")

A backend may round the similarities differently from the fp64 reference, and so pick another token where two are
closer together than that rounding. So nothing is compared with a rerun of the reference that might have gone another
way: every step is checked given what the backend chose before it, against a bound that is derived, not tuned.
"""

from .attention import ExactAttention, exact_attention
from .compare import (
    Finding,
    assert_matches_reference,
    assert_same_bits,
    compare,
    compare_alone,
    exact_similarity,
    replay,
    same_bits,
    similarity_bound,
    unit_roundoff,
)
from .inputs import KINDS, Inputs, PackedInputs, Stages, make_inputs, near_square

__all__ = [
    "KINDS",
    "ExactAttention",
    "Finding",
    "Inputs",
    "PackedInputs",
    "Stages",
    "assert_matches_reference",
    "assert_same_bits",
    "compare",
    "compare_alone",
    "exact_attention",
    "exact_similarity",
    "make_inputs",
    "near_square",
    "replay",
    "same_bits",
    "similarity_bound",
    "unit_roundoff",
]
