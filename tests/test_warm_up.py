"""warm_up on the stub of the CUDA driver: after it, no call of these sizes compiles. Nothing of the package is imported
here: see stubbed.py."""

import sys

import pytest
import torch
from processes import fresh
from stubbed import on_stub, without_interpreter

KINDS = {
    "grid": {},
    "fp32": {"dtypes": torch.float32},
    "two dtypes": {"dtypes": (torch.float16, torch.bfloat16)},
    "fp32 scores": {"scores": torch.float32},
    "positions": {"positions": torch.float32},
    "int64 positions of three axes": {"positions": torch.int64, "axes": 3},
    "no distance": {"distance": False},
    "masked": {"masked": True},
    "packed": {"packed": True},
    "packed, no distance": {"packed": True, "distance": False},
    "packed, fp16 positions": {"packed": True, "positions": torch.float16, "scores": torch.float32},
    "stages": {"stages": True, "masked": True},
}


def call(ck, n, kept, d, dk, dtypes=torch.bfloat16, scores=None, positions=None, axes=2, distance=True,
         masked=False, packed=False, stages=False, images=2):  # fmt: skip
    """As a user would, for an image of n tokens; packed, for images of up to n."""
    for dtype in dtypes if isinstance(dtypes, tuple) else (dtypes,):
        seqlens = [n, max(n // 3, 1)] * (images // 2)
        shape, options = (sum(seqlens),) if packed else (images, n), {"spatial_weight": 0.5 * distance}
        features, prior = torch.empty(*shape, d, dtype=dtype), torch.empty(shape, dtype=scores or dtype)
        if dk is not None:
            options["keys"] = torch.empty(*shape, dk, dtype=dtype)
        if masked:
            options["mask"] = torch.empty(shape, dtype=torch.bool)
        if distance and (packed or positions):
            options["positions"] = torch.empty(shape[-1], axes, dtype=positions or torch.float32)
        elif distance:
            options["grid"] = (1, n)
        if packed:
            ck.select_and_merge_varlen(features, prior, *ck.varlen_budget(seqlens, kept), **options)
        else:
            ck.condense(features, prior, kept, **options)
        if stages:
            s, sbar, g, tier = ck.similarity(options.get("keys", features), prior, options.get("mask"))
            indices = ck.greedy_select(s, prior, kept, sbar=sbar, tier=tier)
            ck.greedy_select(s, g, kept, sbar=sbar, tier=tier)
            where = {name: options[name] for name in ("grid", "positions", "spatial_weight") if name in options}
            assignment = ck.assign(s, indices, tier=tier, **where)
            ck.merge(features, prior, indices, assignment)


def compiled_after(shapes, options, sizes, target=None):
    """By the calls of these sizes, after warm_up of the shapes; and by warm_up."""
    ck, stub_driver = without_interpreter()
    with stub_driver.device(compiling=False) as counts:
        if target is not None:
            import triton

            target = triton.backends.compiler.GPUTarget(*target)
            triton.runtime.driver.active.get_current_target = lambda: target
        count = ck.warm_up(shapes, progress=False, **options)
        warmed = len(counts.compilations)
        counts.reset()
        for size in sizes:
            call(ck, *size, **options)
        call(ck, *sizes[0], **options, images=130)
        return counts.compiled, count, warmed


@on_stub
@pytest.mark.parametrize("kind", KINDS)
def test_after_it_nothing_compiles(kind):
    """Sizes on both sides of every launch choice: short, an image of one token, kept all, long, streamed."""
    sizes = [(576, 64), (1, 1), (64, 7), (577, 192), (729, 729), (1025, 100), (2880, 320), (5000, 1600)]
    sizes = [(n, kept, d, dk) for n, kept in sizes for d, dk in ((64, None), (1152, 80))]
    sizes += [(64, 7, 72, None), (64, 7, 1, 36), (64, 7, 36, 1)]  # channels that Triton tells apart
    if "stages" not in KINDS[kind]:
        sizes += [(16385, 4, 64, None)]
    shapes = [(n, kept, d) if dk is None else (n, kept, d, dk) for n, kept, d, dk in sizes]
    later, count, warmed = fresh(compiled_after, shapes, KINDS[kind], sizes)
    assert not later
    assert warmed == count > 4  # each once


@on_stub
@pytest.mark.parametrize("kind", ["grid", "packed"])
def test_on_amd(kind):
    """Whose compiler also tells apart whether a tensor has more than 2 GiB."""
    sizes = [(n, n // 9, 1024, None) for n in (64, 576, 2880, 16385)]
    shapes = [size[:3] for size in sizes]
    later, count, _ = fresh(compiled_after, shapes, KINDS[kind], sizes, ("hip", "gfx942", 64))
    assert not later
    assert count > 4


@on_stub
def test_a_range_of_sizes():
    sizes = [(n, n // 4, 1024, None) for n in range(65, 1500, 50)]
    later, count, _ = fresh(compiled_after, [(range(64, 1501), 0.25, 1024)], {}, sizes)
    assert not later
    assert count < 40
    later, *_ = fresh(compiled_after, [(range(64, 500), 0.25, 1024)], {}, sizes)
    assert later  # longer images take other kernels: the counts above are no accident


def really_compiled():
    ck, stub_driver = without_interpreter()
    with stub_driver.device() as counts:
        count = ck.warm_up([(64, 8, 64)], torch.bfloat16, progress=False, workers=2)
        warmed, launched = counts.compiled, counts.launches
        loaded = stub_driver.loaded()
        counts.reset()
        call(ck, 64, 8, 64, None)
        return count, warmed, launched, loaded, counts.compiled, counts.launches, stub_driver.loaded()


@on_stub
def test_it_compiles_and_loads_and_launches_nothing():
    count, warmed, launched, loaded, later, launches, loaded_later = fresh(really_compiled)
    assert sum(warmed.values()) == count == 4
    assert not launched and not later
    assert launches == warmed  # each kernel once
    assert loaded == loaded_later == count  # into the device: that, too, has no place in a graph capture


# Without a GPU, and what it is not given


def test_a_cpu_has_nothing_to_compile(capfd):
    import condense_kernels as ck

    assert ck.warm_up([(576, 64, 1024)], device="cpu") == 0
    assert "for cpu there is nothing to compile" in capfd.readouterr().err
    assert ck.warm_up([(576, 64, 1024)], device="cpu", progress=False) == 0
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("shapes", "options", "error"),
    [
        ((576, 64, 1024), {}, r"shapes\[0\]: expected \(N, keep, D\) or \(N, keep, D, Dk\), got 576"),
        (576, {}, r"shapes: expected a list of \(N, keep, D\), got int. Remedy: \[\(N, keep, D\)\]"),
        ([(576, 64)], {}, r"shapes\[0\]: expected \(N, keep, D\) or"),
        ([(0, 1, 8)], {}, r"shapes\[0\]: expected 1 <= shapes\[0\] <= 524288 \(N\), got 0"),
        ([(8, 1, 8), (8, 1, 0)], {}, r"shapes\[1\]: expected 1 <= shapes\[1\] <= 2147483647 \(D and Dk\), got 0"),
        ([(576.5, 1, 8)], {}, r"shapes\[0\]: expected an int, got float"),
        ([(576, 2.0, 8)], {}, r"keep: expected a ratio in \(0, 1\], got 2.0"),
        ([(576, 0, 8)], {}, r"keep: expected 1 <= keep <= 576 tokens, got 0"),
        ([(8, 1, 8)], {"dtypes": torch.float64}, r"dtypes: expected float32, float16, bfloat16, got torch.float64"),
        ([(8, 1, 8)], {"dtypes": ["bf16"]}, r"dtypes: expected float32, float16, bfloat16, got 'bf16'"),
        ([(8, 1, 8)], {"scores": torch.int64}, r"scores: expected None, float32, float16, bfloat16, got torch.int64"),
        ([(8, 1, 8)], {"positions": torch.bool}, r"positions: expected None, .*, got torch.bool. Remedy: positions="),
        ([(8, 1, 8)], {"axes": 0}, r"axes: expected 1 <= axes <= 16 \(of positions\), got 0"),
        ([(8, 1, 8)], {"masked": 1}, r"masked: expected True or False, got int"),
        ([(8, 1, 8)], {"workers": 0}, r"workers: expected 1 <= workers <= 65536 \(threads\), got 0"),
        ([(8, 1, 8)], {"packed": True, "stages": True}, r"stages: expected False, as packed batches have none"),
        ([(8, 1, 8)], {"packed": True, "masked": True}, r"masked: expected False, as packed batches have none"),
        ([(8, 1, 8)], {"device": "meta"}, r"device: expected a GPU or the CPU, got meta. Remedy: device='cuda'"),
        ([(8, 1, 8)], {"device": torch.device("cpu"), "dtypes": 3}, r"dtypes: expected a torch.dtype, or several"),
    ],
)
def test_what_no_call_can_have(shapes, options, error):
    import condense_kernels as ck

    with pytest.raises((TypeError, ValueError), match=error):
        ck.warm_up(shapes, **{"device": "cpu", **options})


def test_without_triton(monkeypatch):
    import condense_kernels as ck

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(ValueError, match=r"device: cuda:1 needs Triton, and the package triton is not installed"):
        ck.warm_up([(8, 1, 8)], device="cuda:1")


@pytest.mark.parametrize("package", ["rich", None])
def test_the_bar_counts_to_the_end(monkeypatch, capsys, package):
    from condense_kernels import warming

    if package is None:
        for name in [name for name in sys.modules if name.partition(".")[0] == "rich"]:
            monkeypatch.setitem(sys.modules, name, None)
        monkeypatch.setitem(sys.modules, "rich", None)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with warming.bar(3, True) as advance:
        advance(1)
        advance(2)
    shown = capsys.readouterr()
    assert not shown.out
    assert ("3 of 3\n" in shown.err) if package is None else ("100%" in shown.err)
    with warming.bar(3, False) as advance:
        advance(3)
    assert capsys.readouterr() == ("", "")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_a_gpu_that_is_not_there():
    import condense_kernels as ck

    with pytest.raises(ValueError, match=r"device: expected one that torch can use, got cuda:0. Remedy: device='cpu'"):
        ck.warm_up([(8, 1, 8)], device="cuda:0")
