"""Compiling ahead: what calls of given sizes will launch, before the first of them comes."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any, NamedTuple

import torch

from ._dispatch import backends
from ._dispatch.checks import MAX_TOKENS, as_count, check_count, check_flag
from ._dispatch.declaration import OPERATORS
from ._triton import launcher
from ._triton.tables import MAX_STORED
from .budget import split_budget

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
POSITIONS = (*DTYPES, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class Sizes(NamedTuple):
    """Of a call."""

    tokens: int
    num_anchors: int
    num_background: int
    channels: int
    key_channels: int | None


class Calls(NamedTuple):
    """What the calls have in common, beside the dtype of features."""

    scores: torch.dtype | None
    positions: torch.dtype | None
    axes: int
    distance: bool
    masked: bool


def warm_up(
    shapes: Sequence[Sequence],
    dtypes: torch.dtype | Sequence[torch.dtype] = torch.bfloat16,
    device: torch.device | str | None = None,
    *,
    scores: torch.dtype | None = None,
    positions: torch.dtype | None = None,
    axes: int = 2,
    distance: bool = True,
    masked: bool = False,
    packed: bool = False,
    stages: bool = False,
    workers: int | None = None,
    progress: bool = True,
) -> int:
    """Compile and load what calls of these sizes will launch on a GPU, so that none of them compiles anything.

    ``warm_up([(576, 64, 1024)])`` is enough for images of 24 x 24, ``warm_up([(range(64, 5801), 0.25, 1024)])`` for
    images of any size up to 5800 tokens, of which a quarter is kept. Nothing is launched, no tensor is made on the GPU.
    Kernels that Triton has on disk are read from there. CPU tensors have kernels that were compiled when the package
    was built: for a CPU this does nothing, says so and returns 0.

    Args:
        shapes: (N, keep, D) or, with keys of Dk channels, (N, keep, D, Dk). N is a number of tokens or a sequence of
            numbers, as a range; keep a count or a ratio, as :func:`split_budget` has it. Of packed batches, N is the
            longest image's.
        dtypes: of features and keys, one or several: fp32, fp16, bf16.
        device: where features will be. None: the current GPU, or the CPU where there is none.
        scores: dtype of the scores. None: as features.
        positions: dtype of positions. None: a grid; of packed batches, fp32.
        axes: of the positions.
        distance: False for calls with spatial_weight=0.
        masked: whether the calls have a mask.
        packed: calls of select_and_merge_varlen, instead of select_and_merge and condense.
        stages: the stages called one by one, too.
        workers: threads that compile at the same time. None: one for each core that the process may use.
        progress: a bar on standard error, of rich where it is installed.

    Returns:
        How many kernels were compiled or read.

    Raises:
        TypeError, ValueError: sizes, dtypes or options that no call can have; a GPU that is not there; no Triton.
    """
    device = device_of(device)
    found, common = sizes_of(shapes), Calls(scores, positions, axes, distance, masked)
    dtypes = dtypes_of(dtypes)
    check_options(dtypes, common, packed, stages, workers)
    if not backends.compiles_for(device):
        if progress:
            print(f"condense_kernels.warm_up: for {device} there is nothing to compile.", file=sys.stderr)
        return 0
    jobs = jobs_of(
        call for dtype in dtypes for sizes in found for call in calls_of(sizes, dtype, common, packed, stages)
    )
    compile_all(jobs, device, workers or usable_cores(), progress)
    return len(jobs)


def usable_cores() -> int:
    """Of this process, where the system tells."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def device_of(device: torch.device | str | None) -> torch.device:
    device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device is None else device)
    if device.type not in ("cuda", "cpu"):
        raise ValueError(f"device: expected a GPU or the CPU, got {device}. Remedy: device='cuda'.")
    if device.type == "cpu":
        return device
    if not torch.cuda.is_available():
        raise ValueError(f"device: expected one that torch can use, got {device}. Remedy: device='cpu', or a GPU.")
    if (reason := backends.triton_unavailable()) is not None:
        raise ValueError(f"device: {device} needs Triton, and {reason}.")
    # Other threads have another current device.
    return torch.device("cuda", torch.cuda.current_device()) if device.index is None else device


def sizes_of(shapes: Sequence[Sequence]) -> list[Sizes]:
    if not isinstance(shapes, Sequence) or isinstance(shapes, str):
        raise TypeError(
            f"shapes: expected a list of (N, keep, D), got {type(shapes).__name__}. Remedy: [(N, keep, D)]."
        )
    found = []
    for i, shape in enumerate(shapes):
        if not isinstance(shape, Sequence) or len(shape) not in (3, 4):
            raise ValueError(f"shapes[{i}]: expected (N, keep, D) or (N, keep, D, Dk), got {shape!r}.")
        tokens, keep, *channels = shape
        for count in channels:
            check_count(f"shapes[{i}]", as_count(f"shapes[{i}]", count), 1, 2**31 - 1, "D and Dk")
        for n in tokens if isinstance(tokens, Sequence) else (tokens,):
            n = as_count(f"shapes[{i}]", n)
            check_count(f"shapes[{i}]", n, 1, MAX_TOKENS, "N")
            kept = split_budget(n, min(keep, n) if type(keep) is int else keep)
            found.append(Sizes(n, *kept, *channels, *[None] * (2 - len(channels))))
    return list(dict.fromkeys(found))


def dtypes_of(dtypes: torch.dtype | Sequence[torch.dtype]) -> tuple[torch.dtype, ...]:
    if not isinstance(dtypes, (torch.dtype, Sequence)) or isinstance(dtypes, str):
        raise TypeError(f"dtypes: expected a torch.dtype, or several, got {dtypes!r}. Remedy: torch.bfloat16.")
    return (dtypes,) if isinstance(dtypes, torch.dtype) else tuple(dtypes)


def check_options(dtypes: Iterable, common: Calls, packed: bool, stages: bool, workers: int | None) -> None:
    expected = {"dtypes": (dtypes, DTYPES), "scores": ((common.scores,), (None, *DTYPES))}
    expected["positions"] = (common.positions,), (None, *POSITIONS)
    for name, (given, allowed) in expected.items():
        for dtype in given:
            if dtype not in allowed:
                names = ", ".join(str(a).removeprefix("torch.") for a in allowed)
                raise TypeError(f"{name}: expected {names}, got {dtype!r}. Remedy: {name}={allowed[-1]}.")
    check_count("axes", common.axes, 1, 16, "of positions")
    for name, flag in {
        "packed": packed,
        "stages": stages,
        "distance": common.distance,
        "masked": common.masked,
    }.items():
        check_flag(name, flag)
    if workers is not None:
        check_count("workers", workers, 1, 2**16, "threads")
    if packed and (stages or common.masked):
        raise ValueError(
            f"{'stages' if stages else 'masked'}: expected False, as packed batches have none, got True. "
            "Remedy: two calls of warm_up, one with packed=True."
        )


def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def calls_of(sizes: Sizes, dtype: torch.dtype, common: Calls, packed: bool, stages: bool) -> Iterator[Callable]:
    """Launchers, to be called without arguments: on meta tensors, of which nothing is read."""
    n, *kept, d, dk = sizes
    images, tokens = ((), 2 * n) if packed else ((1,), n)
    features = empty(*images, tokens, d, dtype=dtype)
    scores = empty(*images, tokens, dtype=common.scores or dtype)
    keys = None if dk is None else empty(*images, tokens, dk, dtype=dtype)
    mask = empty(1, n, dtype=torch.bool) if common.masked else None
    where: dict[str, Any] = {"spatial_weight": float(common.distance)}
    if common.distance and (packed or common.positions is not None):
        where["positions"] = empty(tokens, common.axes, dtype=common.positions or torch.float32)
    elif common.distance:
        where["grid"] = (1, n)
    if packed:
        call, offsets = OPERATORS["select_and_merge_varlen"].triton, (empty(3, dtype=torch.int32),) * 3
        yield lambda: call(features, scores, *offsets, 2 * sum(kept), n, keys=keys, **where)
    else:
        call = OPERATORS["select_and_merge"].triton
        yield lambda: call(features, scores, *kept, keys=keys, mask=mask, **where)
    if stages and n <= MAX_STORED:
        yield lambda: one_by_one(features, scores, features if keys is None else keys, sum(kept), mask, where)


def one_by_one(
    features: torch.Tensor, scores: torch.Tensor, keys: torch.Tensor, kept: int, mask: torch.Tensor | None, where: dict
) -> None:
    """The stages, each as select_and_merge is composed of them."""
    similarity, select, assign, merge = (
        OPERATORS[stage].triton for stage in ("similarity", "greedy_select", "assign", "merge")
    )
    s, sbar, g, tier = similarity(keys, scores, mask)
    for prior in (scores, g):
        indices = select(s, prior, kept, sbar=sbar, tier=tier)
    merge(features, scores, indices, assign(s, indices, tier=tier, **where))


class Job(NamedTuple):
    kernel: Any
    args: tuple
    options: dict

    def kind(self) -> tuple:
        """Equal for launches that Triton compiles alike. What it tells apart, in its arguments, this does."""
        given = dict(zip(self.kernel.arg_names, self.args, strict=False)) | self.options
        fields = []
        for parameter in self.kernel.params:
            value = given.pop(parameter.name)
            fields.append(value if parameter.is_constexpr else told(value, not parameter.do_not_specialize))
        return self.kernel, *fields, *sorted(given.items())


def told(value: Any, special: bool) -> Any:
    if isinstance(value, tuple):
        return tuple(told(field, special) for field in value)
    if isinstance(value, torch.Tensor):
        return value.dtype
    if isinstance(value, int):
        return value.bit_length() > 31, special and value == 1, special and value % 16 == 0
    return type(value)


def jobs_of(calls: Iterable[Callable]) -> list[Job]:
    jobs: dict[tuple, Job] = {}

    def collect(kernel: Any, args: tuple, options: dict) -> None:
        job = Job(kernel, args, options)
        jobs.setdefault(job.kind(), job)

    with launcher.collecting(collect):
        for call in calls:
            call()
    return list(jobs.values())


def compile_all(jobs: list[Job], device: torch.device, workers: int, progress: bool) -> None:
    """In threads: Triton's passes and ptxas run without Python's lock."""
    from triton import AsyncCompileMode

    with (
        launcher.on_device(device),
        bar(len(jobs), progress) as advance,
        ThreadPoolExecutor(workers, "warm_up") as pool,
    ):
        with AsyncCompileMode(pool) as mode:
            compiled = [job.kernel.run(*job.args, grid=(1,), warmup=True, **job.options) for job in jobs]
            advance(len(jobs) - len(mode.raw_futures))
            for _ in as_completed(mode.raw_futures):
                advance(1)
        for kernel in compiled:
            kernel = getattr(kernel, "result", lambda kernel=kernel: kernel)()  # of a future
            kernel.run  # noqa: B018  loads it into the device, which has no place in a graph capture either


@contextlib.contextmanager
def bar(total: int, shown: bool) -> Iterator[Callable[[int], None]]:
    """Yields what is to be called with how many more are done."""
    what = "condense_kernels: kernels compiled"
    if not shown or not sys.stderr.isatty():
        yield lambda more: None
        return
    try:
        from rich.console import Console
        from rich.progress import Progress
    except ImportError:
        done = 0

        def advance(more: int) -> None:
            nonlocal done
            done += more
            print(f"\r{what}: {done} of {total}", end="\n" if done == total else "", file=sys.stderr, flush=True)

        yield advance
        return
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task(what, total=total)
        yield lambda more: progress.advance(task, more)
