"""Named validators: each error says which argument, what was expected, what came, and what to do.

They read metadata only (rank, shape, dtype, device, numbers), never a tensor's values, so nothing waits for a GPU.
csrc/checks.h says the same to callers of the raw operators.
"""

import math
import numbers
from collections.abc import Sequence
from typing import Any

import torch

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
WORKING = (torch.float32, torch.float64)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
FLOAT32_MAX = torch.finfo(torch.float32).max


def check_tensor(
    name: str,
    value: torch.Tensor,
    shape: str,  # the axes' letters, e.g. "B N D"
    sizes: dict[str, int],  # letters already bound to a size; the new ones are added
    dtypes: tuple[torch.dtype, ...],
    like: torch.Tensor | None = None,  # the tensor whose device is expected
) -> None:
    if not isinstance(value, torch.Tensor):
        raise TypeError(
            f"{name}: expected a torch.Tensor [{shape}], got {type(value).__name__}. Remedy: torch.as_tensor({name})."
        )
    axes = shape.split()
    if value.layout != torch.strided or value.is_nested:
        layout, dense = ("nested", "values()") if value.is_nested else (value.layout, "to_dense()")
        raise TypeError(f"{name}: expected a dense tensor, got layout {layout}. Remedy: {name}.{dense}, or padding.")
    if value.dim() != len(axes):
        missing = f"{name}[None], the batch axis" if axes[0] == "B" else f"{name}[:, None], the coordinates' axis"
        hint = f" Remedy: add {missing}." if value.dim() == len(axes) - 1 else ""
        if value.dim() == len(axes) + 1 and value.shape[-1] == 1:
            hint = f" Remedy: {name}.squeeze(-1)."
        raise ValueError(f"{name}: expected {len(axes)} axes [{shape}], got {value.dim()}: {list(value.shape)}.{hint}")
    known = {axis: size for axis, size in sizes.items() if axis in axes}
    if any(sizes.setdefault(axis, size) != size for axis, size in zip(axes, value.shape, strict=True)):
        expected = ", ".join(str(known.get(axis, axis)) for axis in axes)
        why = ", as the arguments before it have" if known else ""
        raise ValueError(f"{name}: expected shape [{shape}] = [{expected}]{why}, got {list(value.shape)}.")
    if value.dtype not in dtypes:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        got = str(value.dtype).removeprefix("torch.")
        raise TypeError(f"{name}: expected dtype {allowed}, got {got}. Remedy: {name}.to({dtypes[0]}).")
    if like is not None and value.device != like.device:
        raise ValueError(
            f"{name}: expected device {like.device}, as of the first argument, got {value.device}. "
            f"Remedy: {name}.to({str(like.device)!r})."
        )


def check_output(
    name: str, value: torch.Tensor, shape: str, sizes: dict[str, int], dtype: torch.dtype, like: torch.Tensor
) -> None:
    check_tensor(name, value, shape, dict(sizes), (dtype,), like)
    if not value.is_contiguous():
        raise ValueError(
            f"{name}: expected a contiguous tensor to write into, got strides {value.stride()}. "
            f"Remedy: {name}.contiguous()."
        )


def address_range(value: torch.Tensor) -> tuple[int, int]:
    """From its first byte to behind its last one; (0, 0) of a tensor without bytes, or without an address."""
    if torch._C._functorch.is_functorch_wrapped_tensor(value) or not (count := value.numel()):
        return 0, 0
    # Not data_ptr(), which would make a copy of a tensor that is copied on write.
    storage = torch._C._data_address(value)  # type: ignore[attr-defined]  # its stub lacks it
    if storage == 0:  # of meta and fake tensors, of subclasses, of zeros that are not stored
        return 0, 0
    size = value.itemsize
    start = storage + value.storage_offset() * size
    if not value.is_contiguous():
        count = 1 + sum((n - 1) * stride for n, stride in zip(value.shape, value.stride(), strict=True))
    return start, start + count * size


def check_apart(written: dict[str, torch.Tensor], read: dict[str, torch.Tensor | None]) -> None:
    """No range of addresses that is written overlaps another one. As csrc/checks.h."""
    for value in written.values():
        if torch._C._is_cow_tensor(value):  # type: ignore[attr-defined]  # its stub lacks it
            value.data_ptr()  # from here on it has memory of its own, as a kernel that writes would give it
    ranges = [(*address_range(t), name) for name, t in (*written.items(), *read.items()) if t is not None]
    for i, (first, end, name) in enumerate(ranges[: len(written)]):
        for other_first, other_end, other in ranges[i + 1 :]:
            if first < other_end and other_first < end:
                overlap = min(end, other_end) - max(first, other_first)
                raise ValueError(
                    f"{name}: expected memory apart from that of {other}, got {overlap} bytes in the address ranges of "
                    f"both. Remedy: torch.empty_like({name})."
                )


def check_not_empty(name: str, value: torch.Tensor, axis: int, what: str) -> None:
    if value.shape[axis] == 0:
        raise ValueError(f"{name}: expected at least one {what}, got shape {list(value.shape)}.")


MAX_TOKENS = 1 << 19  # the fixed-point sum of |s| over all pairs then stays below 2**63


def check_num_tokens(name: str, value: torch.Tensor) -> None:
    if value.shape[1] > MAX_TOKENS:
        raise ValueError(
            f"{name}: expected at most {MAX_TOKENS} tokens an image, got {value.shape[1]}. Remedy: condense windows or "
            "frames separately."
        )


def check_tier(tier: Any, shape: str, sizes: dict[str, int], like: torch.Tensor) -> None:
    """Of a mask, whose True says what tier 0 says, tier.to(torch.int8) would be the wrong remedy."""
    if isinstance(tier, torch.Tensor) and tier.dtype == torch.bool:
        raise TypeError(
            "tier: expected dtype int8, got bool. Remedy: torch.where(mask, 0, 2).to(torch.int8) of a mask of valid "
            "tokens."
        )
    if tier is not None:
        check_tensor("tier", tier, shape, sizes, (torch.int8,), like)


def is_int(value: object) -> bool:
    """Also an open size of make_fx and torch.export."""
    return isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)


def shown(value: object) -> str:
    """As an error prints it. Of an int of some thousand digits, Python itself refuses to."""
    return f"an int of {value.bit_length()} bits" if isinstance(value, int) and value.bit_length() > 128 else str(value)


def number_on_host(name: str, value: torch.Tensor) -> Any:
    """Of a tensor without axes; from a GPU it would be waited for."""
    if value.device.type != "cpu":
        raise TypeError(
            f"{name}: expected a number on the host, got a tensor on {value.device}. Remedy: {name}.item(), which "
            "waits for the device."
        )
    return value.item()


def as_count(name: str, value: Any) -> Any:
    """The int that a numpy integer or an integer tensor without axes stands for; all else as it is, to be checked."""
    if isinstance(value, (int, torch.SymInt)):
        return value
    if isinstance(value, torch.Tensor):
        is_count = value.dim() == 0 and not (value.is_floating_point() or value.is_complex())
        return number_on_host(name, value) if is_count and value.dtype != torch.bool else value
    return int(value) if isinstance(value, numbers.Integral) else value


def as_grid(grid: Any) -> Any:
    """Its sizes as ints; a row of image_grid_thw, on the host, will do."""
    if isinstance(grid, torch.Tensor) and grid.dim() == 1:
        grid = grid.unbind()
    return tuple(as_count("grid", size) for size in grid) if isinstance(grid, Sequence) else grid


def check_count(name: str, value: int, low: int, high: int, why: str) -> None:
    if not is_int(value):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}: {value!r}. Remedy: int({name}).")
    if not low <= value <= high:
        raise ValueError(f"{name}: expected {low} <= {name} <= {high} ({why}), got {shown(value)}.")


def check_weight(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}: {value!r}. Remedy: float({name}).")
    if not 0 <= value <= FLOAT32_MAX:
        raise ValueError(f"{name}: expected a finite number >= 0, got {shown(value)}. Remedy: 0 switches the term off.")


def as_each(name: str, value: Any, like: torch.Tensor, count: int | None = None) -> Any:
    """A number for each image, [B] or of ``count``, where it is one for all; a tensor, and None, as they are."""
    if value is None or isinstance(value, torch.Tensor) or not isinstance(like, torch.Tensor) or like.dim() == 0:
        return value
    if not torch.compiler.is_compiling():
        check_weight(name, value)
    return like.new_full((like.shape[0] if count is None else count,), value, dtype=torch.float64)


def check_background_suppression(value: float | None) -> None:
    if value is not None:  # then as suppression
        check_weight("background_suppression", value)


def check_flag(name: str, value: bool) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, got {type(value).__name__}: {value!r}. Remedy: bool({name}).")


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if not isinstance(value, str) or value not in choices:
        allowed = " or ".join(map(repr, choices))
        raise ValueError(f"{name}: expected {allowed}, got {value!r}.")


def check_s_or_keys(s: Any, keys: Any, of_s: dict[str, Any], of_keys: dict[str, tuple[Any, Any]]) -> None:
    """Exactly one of the two, and nothing that goes with the other: of_s are to be None, of_keys (value, default)."""
    if (s is None) == (keys is None):
        got = "neither" if s is None else "both"
        raise ValueError(
            f"s, keys: expected one of the two, got {got}. Remedy: s of similarity, or the keys that it would "
            "be computed from."
        )
    beside = "s, which has no need of it" if keys is None else "keys, from which it follows"
    given = of_keys if keys is None else {name: (value, None) for name, value in of_s.items()}
    for name, (value, default) in given.items():
        if isinstance(value, torch.Tensor) or value != default:
            got = "a tensor" if isinstance(value, torch.Tensor) else repr(value)
            raise ValueError(f"{name}: expected {default!r} beside {beside}, got {got}. Remedy: leave out {name}.")


def check_budget(num_anchors: int, num_background: int, num_tokens: int) -> None:
    check_count("num_anchors", num_anchors, 0, num_tokens, f"N = {num_tokens} tokens")
    check_count("num_background", num_background, 0, num_tokens, f"N = {num_tokens} tokens")
    if not 1 <= num_anchors + num_background <= num_tokens:
        raise ValueError(
            f"num_anchors + num_background: expected 1 <= K <= N = {num_tokens} tokens, got "
            f"{num_anchors} + {num_background} = {num_anchors + num_background}. "
            "Remedy: keep fewer tokens than there are."
        )


def check_values(name: str, values: torch.Tensor, low: int, high: int) -> None:
    """The one check that reads values: for the reference, which indexes with them. As csrc/checks.h."""
    wrong = values[(values < low) | (values >= high)]
    if len(wrong) > 0:
        raise RuntimeError(f"{name}: expected values in [{low}, {high}), got {int(wrong[0])}.")


def check_grid(grid: Sequence[int], num_tokens: int | None = None) -> None:
    if not isinstance(grid, Sequence) or not all(map(is_int, grid)):
        raise TypeError(
            f"grid: expected (H, W) or (T, H, W) as ints, got {grid!r}. Remedy: tuple(int(g) for g in grid)."
        )
    product = math.prod(grid)
    if len(grid) not in (2, 3) or any(size < 1 for size in grid) or num_tokens not in (None, product):
        sizes = ", ".join(map(shown, grid)) + "," * (len(grid) == 1)  # as a tuple is printed
        of_tokens = "" if num_tokens is None else f" with product N = {num_tokens}"
        raise ValueError(
            f"grid: expected (H, W) or (T, H, W){of_tokens}, got ({sizes}) with product "
            f"{shown(product)}. "
            "Remedy: positions= for tokens that are no full grid."
        )


def check_where(
    grid: Sequence[int] | None,
    positions: torch.Tensor | None,
    spatial_weight: float,
    sizes: dict[str, int],
    like: torch.Tensor,
) -> None:
    """Grid or positions, not both; one of them unless the distance term of Eq. 6 is off."""
    if grid is not None and positions is not None:
        raise ValueError("grid, positions: expected one of the two, got both. Remedy: leave out grid.")
    if grid is None and positions is None and spatial_weight != 0:
        raise ValueError(
            "grid, positions: expected one of the two, as spatial_weight is not 0, got neither. "
            "Remedy: grid=(H, W), or spatial_weight=0 for assignment by similarity alone."
        )
    if grid is not None:
        check_grid(grid, sizes["N"])
    if positions is not None:
        shape = "B N P" if isinstance(positions, torch.Tensor) and positions.dim() == 3 else "N P"
        check_tensor("positions", positions, shape, sizes, FLOATS + INTEGERS, like)
        check_not_empty("positions", positions, -1, "coordinate")
