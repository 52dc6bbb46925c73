import random
from decimal import ROUND_FLOOR, Decimal

import numpy
import pytest
import torch

import condense_kernels as ck
from condense_kernels import condense, select_and_merge, split_budget, varlen_budget
from condense_kernels.budget import rounded
from condense_kernels.testing import assert_same_bits, make_inputs


@pytest.mark.parametrize(
    ("tokens", "keep", "ratio", "expected"),
    [
        (576, 64, 0.25, (48, 16)),
        (576, 192, 0.25, (144, 48)),
        (576, 1 / 3, 0.25, (144, 48)),
        (576, 0.1, 0.25, (43, 15)),  # 57.6 -> 58, 14.5 -> 15
        (10, 0.25, 0.5, (1, 2)),  # 2.5 -> 3, 1.5 -> 2: halves go up
        (10, 0.01, 0.0, (1, 0)),  # at least one token
        (5, 5, 1.0, (0, 5)),
        (576, 1.0, 0.25, (432, 144)),  # all of them, where 1 is one
        (576, 1, 0.25, (1, 0)),
        (50, 0.29, 0.0, (15, 0)),  # 14.5, and 14.499999999999998 in floats
        (50, 29, 0.5, (14, 15)),
        (1000, 100, 0.145, (85, 15)),  # 14.5, and 14.499999999999998
        (9, 1 / 6, 0.0, (2, 0)),  # 1.5: a quotient is a quotient
        (3, 0.49999999, 0.0, (1, 0)),
        (2**19, 0.49999999999999994, 0.0, (2**18, 0)),
        (1, 5e-324, 0.0, (1, 0)),
        (1, 1, 0.25, (1, 0)),
    ],
)
def test_split_budget(tokens, keep, ratio, expected):
    assert split_budget(tokens, keep, ratio) == expected


def test_a_ratio_is_the_decimal_that_was_written():
    """Each with up to six digits, and some of any length and next to a half, at counts from 1 to 2**19."""
    generator = random.Random(0)
    ratios = [i / 100 for i in range(1, 101)] + [i / 1000 for i in range(1, 1000)]
    ratios += [generator.randrange(1, 10**6) / 10**6 for _ in range(2000)]
    ratios += [float(f"{generator.uniform(1e-6, 1):.{digits}g}") for digits in range(7, 16) for _ in range(200)]
    ratios += [0.5 - 10.0**-digits for digits in range(1, 16)] + [1 - 10.0**-digits for digits in range(1, 16)]
    for ratio in ratios:
        for count in (*range(1, 11), 50, 576, 2880, *(generator.randrange(1, 2**19) for _ in range(5))):
            exact = count * Decimal(str(ratio)) + Decimal("0.5")
            assert rounded(count, ratio) == int(exact.to_integral_value(ROUND_FLOOR)), (count, ratio)


def test_a_quotient_of_two_counts_keeps_that_count():
    for total in (7, 49, 576, 729, 2880):
        assert [split_budget(total, k / total, 0.0)[0] for k in range(1, total + 1)] == list(range(1, total + 1))


@pytest.mark.parametrize(
    "number", [numpy.int64, numpy.int32, numpy.uint8, torch.tensor, lambda n: torch.tensor(n, dtype=torch.uint8)],
    ids=["int64", "int32", "uint8", "tensor", "uint8 tensor"],
)  # fmt: skip
def test_counts_of_numpy_and_of_tensors(number):
    """Through every function that takes a count; the operator gets an int."""
    inputs = make_inputs("random", num_tokens=24)
    pair = inputs.features, inputs.scores
    expected = select_and_merge(*pair, 6, 2, grid=(4, 6))
    counts, grid = (number(6), number(2)), (number(4), number(6))
    assert split_budget(number(24), number(8)) == (6, 2)
    assert [type(n) for n in split_budget(number(24), number(8), number(1))] == [int, int]
    assert varlen_budget([number(10), 4], number(8))[3:] == (12, 10)
    assert_same_bits(select_and_merge(*pair, *counts, grid=grid), expected)
    assert_same_bits(ck.Condense(*counts, grid=grid)(*pair), expected)
    assert_same_bits(condense(*pair, keep=number(8), grid=grid), expected)
    assert ck.workspace_bytes(*pair, *counts, grid=grid) == ck.workspace_bytes(*pair, 6, 2, grid=(4, 6))
    s = ck.similarity(inputs.features)[0]
    assert torch.equal(ck.greedy_select(s, inputs.scores, counts[0]), ck.greedy_select(s, inputs.scores, 6))
    assert torch.equal(
        ck.assign(s, expected.indices, grid=torch.tensor([4, 6])), ck.assign(s, expected.indices, grid=(4, 6))
    )
    *offsets, total, longest = varlen_budget([24, 24], 8)
    tokens = inputs.features.flatten(0, 1), inputs.scores.flatten()
    packed = ck.select_and_merge_varlen(*tokens, *offsets, number(total), number(longest), spatial_weight=0.0)
    assert packed.merged.shape[0] == 16


@pytest.mark.parametrize("wrong", [True, numpy.bool_(True), torch.tensor(True), numpy.float64(2.0), "2"])
def test_what_is_no_count(wrong):
    inputs = make_inputs("random", num_tokens=24)
    s = ck.similarity(inputs.features)[0]
    with pytest.raises(TypeError, match="^num_anchors: expected an int, got"):
        select_and_merge(inputs.features, inputs.scores, wrong, 2, grid=(4, 6))
    with pytest.raises(TypeError, match="^k: expected an int, got"):
        ck.greedy_select(s, inputs.scores, wrong)
    with pytest.raises(TypeError, match="^grid: expected"):
        select_and_merge(inputs.features, inputs.scores, 4, 2, grid=(wrong, 12))
    with pytest.raises(ValueError, match="^num_tokens: expected an int"):
        split_budget(wrong, 1)


def test_a_count_elsewhere_would_be_waited_for():
    inputs, away = make_inputs("random", num_tokens=24), torch.tensor(2, device="meta")
    with pytest.raises(TypeError, match=r"^num_anchors: expected a number on the host, got a tensor on meta. Remedy"):
        select_and_merge(inputs.features, inputs.scores, away, 2, grid=(4, 6))
    for ratio in (away, away.float()):
        with pytest.raises(TypeError, match=r"^keep: expected a number on the host.*Remedy: keep.item"):
            split_budget(24, ratio)
    for name, arguments in (("seqlens", (away.expand(3), 2)), ("keep", ([4, 5, 6], away.expand(3)))):
        with pytest.raises(TypeError, match=rf"^{name}: expected numbers on the host.*Remedy: {name}.flatten"):
            varlen_budget(*arguments)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_ratios_of_numpy_and_of_tensors(dtype):
    """The decimal is that of the number's own precision."""
    tensor = torch.tensor(0.29, dtype=dtype)
    assert split_budget(50, tensor, tensor) == (11, 4)
    if dtype != torch.bfloat16:
        assert split_budget(50, tensor.numpy()[()], tensor.numpy()[()]) == (11, 4)


@pytest.mark.parametrize("of", [list, tuple, numpy.array, torch.tensor], ids=["list", "tuple", "array", "tensor"])
def test_budgets_of_each_image(of):
    counts = varlen_budget([10, 0, 2, 18], of([4, 4, 5, 0]), background_ratio=0.5)
    assert [x.tolist() for x in counts[1:3]] == [[0, 2, 2, 3, 3], [0, 2, 2, 3, 3]]  # at most all, or none
    assert counts[3:] == (6, 18)
    ratios = varlen_budget(of([10, 0, 50]), of([1.0, 0.5, 0.29]), background_ratio=0.0)
    assert ratios.cu_anchors.tolist() == [0, 10, 10, 25] and ratios.max_seqlen == 50


def test_budgets_of_each_image_say_which_is_wrong():
    assert varlen_budget([10, 20], [4, 0.5], 0.0).cu_anchors.tolist() == [0, 4, 14]  # one a count, one a ratio
    with pytest.raises(ValueError, match=r"^keep: expected one for each of the 2 images of seqlens, got 3. Remedy"):
        varlen_budget([10, 20], [4, 5, 6])
    with pytest.raises(ValueError, match=r"^keep\[1\]: expected a ratio in \(0, 1\], got 1.5"):
        varlen_budget([10, 20], [4, 1.5])
    with pytest.raises(ValueError, match=r"^keep\[0\]: expected 1 <= keep\[0\] <= 10 tokens, got -1"):
        varlen_budget([10, 20], [-1, 4])
    for wrong in (True, False, numpy.bool_(False), "4", None):
        with pytest.raises(TypeError, match=r"^keep\[1\]: expected an int count or a float ratio"):
            varlen_budget([10, 20], [4, wrong])
    with pytest.raises(ValueError, match="^keep: expected 1 <= keep"):
        varlen_budget([10, 20], 0)


@pytest.mark.parametrize("keep", [0, -1, 577, 0.0, -0.5, 1.5, float("nan")])
def test_budget_out_of_range(keep):
    with pytest.raises(ValueError, match="^keep: expected"):
        split_budget(576, keep)


@pytest.mark.parametrize("keep", [True, "64", None, torch.tensor(True), numpy.bool_(True), torch.tensor([64])])
def test_budget_of_the_wrong_type(keep):
    with pytest.raises(TypeError, match="^keep: expected an int count or a float ratio"):
        split_budget(576, keep)


@pytest.mark.parametrize(("ratio", "error"), [(-0.1, ValueError), (1.1, ValueError), ("half", TypeError)])
def test_background_ratio_out_of_range(ratio, error):
    with pytest.raises(error, match="^background_ratio: expected"):
        split_budget(576, 64, ratio)


def test_num_tokens_out_of_range():
    with pytest.raises(ValueError, match="^num_tokens: expected"):
        split_budget(0, 1)


def test_condense_is_select_and_merge_with_the_split(backend):
    inputs = make_inputs("random", num_tokens=24)
    expected = select_and_merge(inputs.features, inputs.scores, 6, 2, grid=(4, 6), suppression=0.5, backend=backend)
    for keep in (8, 1 / 3):
        result = condense(inputs.features, inputs.scores, keep=keep, grid=(4, 6), suppression=0.5, backend=backend)
        assert_same_bits(result, expected)


def test_condense_names_a_wrong_rank():
    with pytest.raises(ValueError, match=r"^features: expected 3 axes \[B N D\].*features\[None\]"):
        condense(torch.rand(576, 16), torch.rand(576), grid=(24, 24))
    with pytest.raises(TypeError, match=r"^features: expected a torch.Tensor.*got list"):
        condense([[1.0]], torch.rand(576))


def test_a_traced_budget_is_the_same():
    """In ints of 64 bits, whatever the ratio, where eager has Python's."""
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x, r: x.new_zeros(split_budget(x.shape[0], r, 0.145)), backend="eager", dynamic=True
    )
    for ratio in (0.29, 1 / 6, 0.49999999999999994, 0.7360283712347563, 1.0):
        for count in (50, 9, 3, 1000, 2**19 - 1):
            expected = split_budget(count, ratio, 0.145)
            if min(expected) > 1:  # sizes of 0 and 1 are compiled anew
                assert tuple(compiled(torch.empty(count, device="meta"), ratio).shape) == expected
