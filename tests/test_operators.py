"""What every operator owes torch and its callers, of all that are declared: a new one is tested here without a line.

The calls are those that each op.py declares as its examples.
"""

import inspect
import itertools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import condense_kernels as ck
from condense_kernels._dispatch import backends
from condense_kernels._dispatch.declaration import OPERATORS, Example, Operator
from condense_kernels._dispatch.library import SCHEMAS, listed, schema_of
from condense_kernels.testing import assert_same_bits

CPU = torch.device("cpu")
OPS = torch.ops.condense
BY_NAME = pytest.mark.parametrize("operator", OPERATORS.values(), ids=OPERATORS.keys())


def permuted(value):
    """Dense, with the axes in another order in memory: catches a fake kernel that copies its input's strides."""
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return value
    axes = range(value.dim() - 1, -1, -1)
    return value.permute(*axes).contiguous().permute(*axes)


def with_gradients(operator: Operator, example: Example, count: int) -> Example:
    """Of the first so many arguments, where they are floating."""
    args = list(example.args)
    for i in range(min(count, len(args))):
        if isinstance(args[i], torch.Tensor) and args[i].is_floating_point():
            args[i] = args[i].clone().requires_grad_()
    return Example(tuple(args), example.kwargs)


def calls_of(operator: Operator) -> list[Example]:
    torch.manual_seed(0)
    examples = operator.examples(2)
    found = [*examples, *(Example(tuple(map(permuted, e.args)), e.kwargs) for e in examples[:2])]
    counts = (1, operator.derivatives.of) if operator.derivatives is not None else ()
    return found + [with_gradients(operator, e, count) for e in examples[:2] for count in counts]


CALLS = [(operator, call) for operator in OPERATORS.values() for call in calls_of(operator)]
EVERY_CALL = pytest.mark.parametrize(
    ("operator", "call"), CALLS, ids=[f"{i}-{operator.name}" for i, (operator, _) in enumerate(CALLS)]
)


def raw(operator: Operator):
    return getattr(OPS, operator.name).default


def public(operator: Operator):
    return getattr(ck, operator.name, None)


def named(operator: Operator, call: Example) -> dict:
    """The arguments by name."""
    positional = (argument.name for argument in schema_of(operator.name).arguments)
    return {**dict(zip(positional, call.args, strict=False)), **call.kwargs}


def test_every_schema_is_declared():
    assert set(OPERATORS) == set(SCHEMAS)


@BY_NAME
def test_the_examples_cover_all_arguments(operator):
    """Else what is tested with them would be less than it says."""
    given = set().union(*(named(operator, example) for example in operator.examples(2)))
    assert given | {"workspace"} >= {argument.name for argument in schema_of(operator.name).arguments}


@EVERY_CALL
def test_opcheck(operator, call):
    if operator.fake is None:  # it returns no tensor
        assert isinstance(raw(operator)(*call.args, **call.kwargs), int)
    else:
        torch.library.opcheck(raw(operator), call.args, dict(call.kwargs))


@EVERY_CALL
def test_fake_agrees_in_shape_dtype_and_strides(operator, call):
    if operator.fake is None:
        return
    real = raw(operator)(*call.args, **call.kwargs)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        convert = lambda value: mode.from_tensor(value) if isinstance(value, torch.Tensor) else value  # noqa: E731
        kwargs = {name: convert(value) for name, value in call.kwargs.items()}
        fake = raw(operator)(*map(convert, call.args), **kwargs)
    for r, f in zip(*(() if x is None else listed(x) for x in (real, fake)), strict=True):
        assert (f.shape, f.dtype, f.stride(), f.device) == (r.shape, r.dtype, r.stride(), r.device)


@EVERY_CALL
def test_backends_agree_in_shape_and_dtype(operator, call):
    """What they compute is held to the reference in each operator's own test."""
    kwargs = {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in call.kwargs.items()}
    expected = raw(operator)(*call.args, **call.kwargs)
    for backend in ("triton", "reference"):
        if any(isinstance(v, torch.Tensor) and v.dtype == torch.float64 for v in call.args) and backend == "triton":
            continue  # refused, see test_errors.py
        result = backends.run(operator.name, backend, call.args, kwargs)
        if isinstance(expected, int) or expected is None:
            assert type(result) is type(expected)
            continue
        for r, e in zip(listed(result), listed(expected), strict=True):
            assert (r.shape, r.dtype) == (e.shape, e.dtype)


# Wrong arguments


def wrong_values(value, alone: bool) -> list[tuple[str, object]]:
    """(what is wrong, the value instead); alone: the only tensor of a call may be on any device."""
    if isinstance(value, torch.Tensor):
        found = [
            ("axes", value[None, None]),
            ("complex", value.to(torch.complex64)),
            ("sparse", value.to_sparse()),
            ("no tensor", value.tolist()),
        ]
        return found if alone else [*found, ("elsewhere", value.to("meta"))]
    if isinstance(value, str):
        return [("another word", value.upper()), ("a number", 1)]
    if isinstance(value, bool):
        return [("text", "yes"), ("a number", 1)]
    if isinstance(value, float):
        return [("nan", float("nan")), ("negative", -1.0), ("too large", 1e300), ("text", "much")]
    if isinstance(value, int):
        return [("negative", -1), ("too many", 10**6), ("a fraction", 2.5), ("text", "many")]
    return [("another product", [7, 7]), ("one axis", [12]), ("text", "3x4")]


WRONG = [
    (operator, name, what, wrong, example)
    for operator in OPERATORS.values()
    for example in operator.examples(2)[:2]
    for name, value in named(operator, example).items()
    for what, wrong in wrong_values(value, len(example.args) == 1)
]


@pytest.mark.parametrize(
    ("operator", "name", "what", "wrong", "example"),
    WRONG,
    ids=[f"{i}-{case[0].name}-{case[1]}-{case[2]}" for i, case in enumerate(WRONG)],
)
def test_a_wrong_argument_is_named(operator, name, what, wrong, example):
    arguments = {**named(operator, example), name: wrong}
    match = rf"\b{name}\b.*expected"
    if what == "elsewhere":  # it may be the one whose device the others are held to
        match += r"|expected device meta"
    with pytest.raises((TypeError, ValueError), match=match):
        operator.check(**arguments)
    if what in ("no tensor", "text", "a fraction", "a number") or (what == "elsewhere" and operator.fake is None):
        return  # torch itself refuses, or converts, what is not of the schema's type; and a device without a kernel
    if what == "sparse":  # likewise, where it is the first
        match += "|[Ss]parse"
    with pytest.raises(RuntimeError, match=rf"{match}|expected all tensors on the device of the first argument"):
        raw(operator)(**arguments)


# What goes through all operators


@BY_NAME
def test_vmap_is_a_loop(operator):
    """Over a new first axis of every tensor; the raw operator."""
    if operator.fake is None or operator.no_vmap is not None:
        args, kwargs = operator.examples(2)[0]
        tensors = [i for i, value in enumerate(args) if isinstance(value, torch.Tensor)]
        batched = [torch.stack([value, value]) if i in tensors else value for i, value in enumerate(args)]
        in_dims = tuple(0 if i in tensors else None for i in range(len(args)))
        mapped = torch.func.vmap(lambda *values: raw(operator)(*values, **kwargs), in_dims)
        with pytest.raises(RuntimeError, match=rf"{operator.name} has no rule for torch.func.vmap. Remedy: "):
            mapped(*batched)
        return
    for example, other in zip(operator.examples(2), operator.examples(2), strict=True):
        arguments, others = named(operator, example), named(operator, other)
        tensors = {name: value for name, value in arguments.items() if isinstance(value, torch.Tensor)}
        rest = {name: value for name, value in arguments.items() if name not in tensors}
        stacked = {name: torch.stack([value, others[name]]) for name, value in tensors.items()}
        mapped = torch.func.vmap(lambda tensors, rest=rest: raw(operator)(**tensors, **rest))(stacked)
        alone = [listed(raw(operator)(**{n: t[i] for n, t in stacked.items()}, **rest)) for i in range(2)]
        for result, expected in zip(listed(mapped), zip(*alone, strict=True), strict=True):
            assert_same_bits(result, torch.stack(expected))


@BY_NAME
def test_the_public_function_returns_what_the_operator_returns(operator):
    if public(operator) is None or not schema_of(operator.name).returns:
        return
    for args, kwargs in operator.examples(2):
        results = public(operator)(*args, **kwargs, **operator.as_operator)
        expected = raw(operator)(*args, **kwargs)
        if operator.fake is None:
            assert results == expected
        else:
            assert_same_bits(tuple(listed(results)), listed(expected))


@BY_NAME
def test_the_debug_switch_sees_a_nan(operator):
    if operator.look is None or public(operator) is None:
        return
    args, kwargs = operator.examples(2)[0]
    first = args[0].clone()
    first.view(-1)[0] = float("nan")
    public(operator)(first, *args[1:], **kwargs)
    name = schema_of(operator.name).arguments[0].name
    with ck.debug(), pytest.raises(ValueError, match=rf"^{name}: expected .*, got nan at "):
        public(operator)(first, *args[1:], **kwargs)


@BY_NAME
def test_the_flop_counter_counts(operator):
    for args, kwargs in operator.examples(2):
        with FlopCounterMode(display=False) as counter:
            raw(operator)(*args, **kwargs)
        tensor = lambda value: value.shape if isinstance(value, torch.Tensor) else value  # noqa: E731
        expected = operator.flops(*map(tensor, args), **{name: tensor(value) for name, value in kwargs.items()})
        assert counter.get_total_flops() == expected
        assert operator.fake is None or expected > 0 or args[2:] == (0,)  # picks


def test_flops_of_the_stages_add_up():
    """By hand, for N = 12, D = 5, Dk = 3, K = 5 on a grid."""
    features, scores, keys = torch.rand(2, 12, 5), torch.rand(2, 12), torch.rand(2, 12, 3)
    with FlopCounterMode(display=False) as counter:
        ck.select_and_merge(features, scores, 3, 2, keys=keys, grid=(3, 4))
    pairs, picks, nearest, merged = 12 * 13 * 3, 4 * 12 * 5, 12 * 5 * (1 + 3 * 2 + 2), 2 * 12 * 5 + 5 * 5
    assert counter.get_total_flops() == 2 * (pairs + picks + nearest + merged)


@pytest.mark.parametrize(("of_scores", "each"), [(False, 1), (True, 4)])
def test_flops_of_backward(of_scores, each):
    features, scores = torch.rand(2, 12, 5, requires_grad=True), torch.rand(2, 12, requires_grad=of_scores)
    with FlopCounterMode(display=False) as forward:
        merged = ck.select_and_merge(features, scores, 3, 2, grid=(3, 4)).merged
    with FlopCounterMode(display=False) as backward:
        merged.sum().backward()
    assert forward.get_total_flops() > 0
    assert backward.get_total_flops() == each * 2 * 12 * 5


@BY_NAME
def test_the_public_function_takes_what_the_operator_takes(operator):
    """In the schema's order, with its defaults; further arguments are keywords."""
    function = public(operator)
    if function is None:
        return
    parameters = inspect.signature(function).parameters
    for argument, parameter in zip(schema_of(operator.name).arguments, parameters.values(), strict=False):
        assert argument.name == parameter.name
        if argument.has_default_value():
            assert parameter.default == argument.default_value
    extra = itertools.islice(parameters.values(), len(schema_of(operator.name).arguments), None)
    assert all(parameter.kind is parameter.KEYWORD_ONLY for parameter in extra)
