"""DTensors in two processes of this machine, which talk over its loopback interface.

Starting the two takes seconds, so one pair runs all cases: functions of a mesh, called by both ranks, whose assertions
come back as text.
"""

import argparse
import dataclasses
import datetime
import functools
import importlib.util
import json
import os
import subprocess
import sys
import traceback
from pathlib import Path

import numpy
import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DeviceMesh, DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import PrepareModuleInput, parallelize_module

import condense_kernels as ck
import condense_kernels.distributed
from condense_kernels._dispatch.declaration import OPERATORS
from condense_kernels.testing import assert_same_bits, make_inputs

OPS = torch.ops.condense
EXAMPLES = Path(__file__).parent.parent / "docs" / "examples"
WORLD_SIZE = 2
SECONDS = 300  # for all cases, of which some 10 are needed where nothing else runs
CASES = {}


def case(function=None, **parameters):
    """Registers a case, to be called as function(mesh, **parameters)."""
    if function is None:
        return functools.partial(case, **parameters)
    CASES["-".join([function.__name__, *map(str, parameters.values())])] = functools.partial(function, **parameters)
    return function


@pytest.fixture(scope="module")
def reports(tmp_path_factory) -> list[dict[str, str]]:
    """What each rank says of each case."""
    folder = tmp_path_factory.mktemp("ranks")
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    said = [folder / f"{rank}.txt" for rank in range(WORLD_SIZE)]
    ranks = []
    try:
        for rank, path in enumerate(said):
            command = [sys.executable, __file__, str(rank), str(folder)]
            with path.open("w") as file:
                ranks.append(subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT))
        for process in ranks:
            process.wait(timeout=SECONDS)
    finally:
        for process in ranks:
            process.kill()
    reports = [folder / f"{rank}.json" for rank in range(WORLD_SIZE)]
    return [
        json.loads(r.read_text()) if r.exists() else {"": s.read_text()} for r, s in zip(reports, said, strict=True)
    ]


@pytest.mark.parametrize("name", CASES)
def test_on_two_ranks(name, reports):
    for rank, report in enumerate(reports):
        said = report.get(name, f"was not run, as before it:\n{[*report.values()][-1]}")
        assert said == "passed", f"rank {rank}: {said}"


def run_cases(rank: int, folder: Path) -> None:
    """Up to the first that fails: the other rank may still be in it, so what comes after would say nothing."""
    timeout = datetime.timedelta(seconds=SECONDS / 3)  # then the rank that waits tells, before both are ended
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", timeout, WORLD_SIZE, rank)
    torch.use_deterministic_algorithms(True, warn_only=True)  # torch.empty hands out NaN, as in the other tests
    mesh, report = DeviceMesh("cpu", [0, 1]), {}
    for name, function in CASES.items():
        try:
            function(mesh)
            report[name] = "passed"
        except Exception:
            report[name] = traceback.format_exc()
            break
    (folder / f"{rank}.json").write_text(json.dumps(report))
    dist.destroy_process_group()


def calls(batch: int) -> dict[str, tuple[tuple, dict]]:
    """A call of each operator with all of its tensors, and of the flagship in each form."""
    masked, placed = (make_inputs(kind, batch=batch, num_tokens=12, channels=5) for kind in ("masked", "positions"))
    features, scores, *kept = masked.args
    stages = masked.run_stages()
    merged, indices, assignment, mass = stages.condensed
    everything = {**placed.options, "keys": features[..., :3].cos(), "mask": masked.mask}
    one_layout = {"positions": torch.arange(24.0).reshape(12, 2)}  # [N, P], for all images
    tier = {"tier": stages.tier}
    return {
        "similarity": ((features, scores, masked.mask), {}),
        "greedy_select": ((stages.s, scores, 3), {"sbar": stages.sbar, **tier}),
        "assign": ((stages.s, indices), {**tier, **one_layout}),
        "merge": ((features, scores, indices, assignment), {}),
        "merge_backward": ((merged.cos(), mass.sin(), features, scores, merged, mass, indices, assignment), {}),
        "merge_backward, of features": ((merged.cos(), mass.sin(), None, scores, None, mass, indices, assignment), {}),
        "select_and_merge": ((features, scores, *kept), everything),
        "select_and_merge, one layout": ((features, scores, *kept), one_layout),
        "select_and_merge, grid": ((features, scores, *kept), {"grid": [3, 4]}),
    }


def declared(batch: int) -> dict[str, tuple[tuple, dict]]:
    """What every operator that runs on shards declares, the same on all ranks."""
    torch.manual_seed(0)
    operators = [operator for operator in OPERATORS.values() if operator.no_shards is None]
    return {f"{o.name}, declared {i}": tuple(e) for o in operators for i, e in enumerate(o.examples(batch))}


def listed(results) -> tuple:
    return results if isinstance(results, tuple) else (results,)


def check_call(mesh, name, args, kwargs, place, *, results, collectives):
    """place(whole, argument's name) makes DTensors; their results are those of the whole batch, placed as expected."""
    op = getattr(OPS, name.partition(",")[0]).default
    arguments = dict(zip((a.name for a in op._schema.arguments), args, strict=False)) | kwargs
    with torch.no_grad():
        whole = listed(op(**arguments))
        placed = {n: place(t, n) if isinstance(t, torch.Tensor) else t for n, t in arguments.items()}
        with CommDebugMode() as communication:
            out = listed(op(**placed))
        assert communication.get_total_counts() == collectives, communication.get_comm_counts()
        for got, expected in zip(out, whole, strict=True):
            assert got.placements == tuple(results)
            assert (got.shape, got.stride(), got.dtype) == (expected.shape, expected.stride(), expected.dtype)
            assert_same_bits(got.full_tensor(), expected)


def by_image(mesh, *placements):
    """A batch cut by images along the mesh (the first rank has one more), and a layout for all of them everywhere."""
    placements = placements or [Shard(0)] * mesh.ndim

    def place(whole: torch.Tensor, name: str) -> DTensor:
        shared = whole.dim() == {"positions": 2, "rows": 1}.get(name)
        return distribute_tensor(whole, mesh, [Replicate()] * mesh.ndim if shared else placements)

    return place


@case(batch=4)
@case(batch=3)  # two images and one
@case(batch=1)  # an empty shard
@case(batch=0)
def shards_go_through_without_communication(mesh, batch):
    for name, (args, kwargs) in (calls(batch) | declared(batch)).items():
        check_call(mesh, name, args, kwargs, by_image(mesh), results=[Shard(0)], collectives=0)


@case
def replicas_stay_replicas(mesh):
    for name, (args, kwargs) in (calls(3) | declared(3)).items():
        check_call(mesh, name, args, kwargs, by_image(mesh, Replicate()), results=[Replicate()], collectives=0)


@case
def replicas_beside_a_shard_are_cut(mesh):
    """Also those given by keyword, which the rules of register_sharding leave as they are."""
    for name, (args, kwargs) in (calls(3) | declared(3)).items():
        sharded = iter([Shard(0)])
        place = lambda whole, n, sharded=sharded: by_image(mesh, next(sharded, Replicate()))(whole, n)  # noqa: E731
        check_call(mesh, name, args, kwargs, place, results=[Shard(0)], collectives=0)


@case(argument="features")
@case(argument="scores")
@case(argument="keys")
@case(argument="mask")
@case(argument="positions")
def an_axis_of_an_image_is_gathered(mesh, argument):
    args, kwargs = calls(3)["select_and_merge"]
    place = lambda whole, n: by_image(mesh, Shard(1) if n == argument else Replicate())(whole, n)  # noqa: E731
    check_call(mesh, "select_and_merge", args, kwargs, place, results=[Replicate()], collectives=1)


@case
def one_layout_that_is_cut_is_gathered(mesh):
    args, kwargs = calls(3)["assign"]
    cut = lambda whole, n: distribute_tensor(whole, mesh, [Shard(0)])  # noqa: E731  positions [N, P]: along N
    check_call(mesh, "assign", args, kwargs, cut, results=[Shard(0)], collectives=1)


@case
def tokens_are_exchanged_for_images(mesh):
    """Shard(1) beside Shard(0): an all-to-all, and nothing is held whole."""
    args, kwargs = calls(4)["select_and_merge"]
    place = lambda whole, n: by_image(mesh, Shard(1) if n == "features" else Shard(0))(whole, n)  # noqa: E731
    check_call(mesh, "select_and_merge", args, kwargs, place, results=[Shard(0)], collectives=1)


@case
def partial_sums_are_added_first(mesh):
    args, kwargs = calls(3)["select_and_merge"]

    def place(whole, name):
        if name in ("features", "scores"):
            return DTensor.from_local(whole / WORLD_SIZE, mesh, [Partial()])  # halves: exact
        return by_image(mesh, Replicate())(whole, name)

    check_call(mesh, "select_and_merge", args, kwargs, place, results=[Replicate()], collectives=2)


@case(shape=(2, 1))
@case(shape=(1, 2))
def meshes_of_two_axes(mesh, shape):
    """Data parallel by (2, 1); by (1, 2) the tokens are sharded along the second axis and gathered."""
    grid = DeviceMesh("cpu", torch.arange(WORLD_SIZE).reshape(shape))
    args, kwargs = calls(3)["select_and_merge"]
    place = lambda whole, n: by_image(grid, Shard(0), Shard(1) if n == "features" else Replicate())(whole, n)  # noqa: E731
    check_call(
        grid, "select_and_merge", args, kwargs, place, results=[Shard(0), Replicate()], collectives=int(shape == (1, 2))
    )


@case
def gradients_are_sharded_as_their_tensors(mesh):
    args, kwargs = calls(3)["select_and_merge"]
    whole = [args[0].clone().requires_grad_(), args[1].clone().requires_grad_()]
    out = ck.select_and_merge(*whole, *args[2:], **kwargs)
    directions = [out.merged.detach().cos(), out.mass.detach().sin()]
    place = by_image(mesh)
    for used in (0,), (1,), (0, 1):  # of merged and mass
        expected = torch.autograd.grad(
            [(out.merged, out.mass)[i] for i in used], whole, [directions[i] for i in used], retain_graph=True
        )
        for function in (ck.select_and_merge, OPS.select_and_merge):
            inputs = [place(t.detach(), "").requires_grad_() for t in whole]
            upstream = [place(directions[i], "") for i in used]
            options = {n: place(t, n) if isinstance(t, torch.Tensor) else t for n, t in kwargs.items()}
            with CommDebugMode() as communication:
                merged, _, _, mass = function(*inputs, *args[2:], **options)
                grads = torch.autograd.grad([(merged, mass)[i] for i in used], inputs, upstream)
            assert communication.get_total_counts() == 0
            for grad, wanted in zip(grads, expected, strict=True):
                assert grad.placements == (Shard(0),)
                assert_same_bits(grad.full_tensor(), wanted)


@case
def gradients_of_what_was_gathered(mesh):
    features, scores = calls(3)["select_and_merge"][0][:2]
    whole = features.clone().requires_grad_()
    ck.select_and_merge(whole, scores, 3, 1, spatial_weight=0).merged.sum().backward()
    leaf = distribute_tensor(features, mesh, [Shard(1)]).requires_grad_()
    replicated = distribute_tensor(scores, mesh, [Replicate()])
    ck.select_and_merge(leaf, replicated, 3, 1, spatial_weight=0).merged.sum().backward()
    assert_same_bits(leaf.grad.full_tensor(), whole.grad)


@case(backend="reference")
@case(backend="triton")
def backends_that_are_asked_for(mesh, backend):
    """Each rank runs it on its own images, in backward as well."""
    inputs = make_inputs("keys", batch=3, num_tokens=12, channels=5)
    features = distribute_tensor(inputs.features, mesh, [Shard(0)]).requires_grad_()
    scores, keys = (distribute_tensor(t, mesh, [Shard(0)]) for t in (inputs.scores, inputs.keys))
    out = ck.select_and_merge(features, scores, *inputs.args[2:], keys=keys, grid=inputs.grid, backend=backend)
    whole = dataclasses.replace(inputs, features=inputs.features.clone().requires_grad_())
    expected = whole.run(backend)
    for got, wanted in zip(out, expected, strict=True):
        assert got.placements == (Shard(0),)
        assert_same_bits(got.full_tensor(), wanted)
    out.merged.sum().backward()
    expected.merged.sum().backward()
    assert_same_bits(features.grad.full_tensor(), whole.features.grad)


@case
def compiled(mesh):
    """With gradients, and with another batch than the first."""

    def step(features, scores):
        return ck.select_and_merge(features, scores, 3, 1, grid=(3, 4)).merged * 2

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    for batch in (4, 6):
        features, scores = (t.contiguous() for t in make_inputs(batch=batch, num_tokens=12).args[:2])
        whole = features.clone().requires_grad_()
        sharded = distribute_tensor(features, mesh, [Shard(0)]).requires_grad_()
        expected = step(whole, scores)
        out = compiled(sharded, distribute_tensor(scores, mesh, [Shard(0)]))
        assert_same_bits(out.full_tensor(), expected)
        expected.sum().backward()
        out.sum().backward()
        assert_same_bits(sharded.grad.full_tensor(), whole.grad)


@case
def sharded_parameters_are_none_of_its_business(mesh):
    """FSDP2 shards the layer's weights; what comes out of the layer is a plain tensor of this rank's images."""
    features, scores = make_inputs(batch=WORLD_SIZE, num_tokens=12, channels=8).args[:2]
    torch.manual_seed(0)
    alone, sharded = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)
    sharded.load_state_dict(alone.state_dict())
    fully_shard(sharded, mesh=mesh)
    mine = slice(dist.get_rank(), dist.get_rank() + 1)

    def loss(layer, rows):
        return ck.select_and_merge(layer(features[rows]), scores[rows], 3, 1, grid=(3, 4)).merged.square().mean()

    loss(alone, slice(None)).backward()
    loss(sharded, mine).backward()
    torch.testing.assert_close(sharded.weight.grad.full_tensor(), alone.weight.grad)


@case
def sequence_parallelism(mesh):
    """As docs/distributed.md has it: each rank brings its tokens of all images, and condenses its images."""
    features, scores = make_inputs(batch=3, num_tokens=12).args[:2]
    plan = PrepareModuleInput(input_layouts=(Shard(1), Shard(1)), desired_input_layouts=(Shard(0), Shard(0)))
    layer = parallelize_module(ck.Condense(3, 1, grid=(3, 4)), mesh, plan)
    mine = slice(6 * dist.get_rank(), 6 * dist.get_rank() + 6)
    out = layer(features[:, mine], scores[:, mine])
    assert out.merged.placements == (Shard(0),)
    assert_same_bits(out.merged.full_tensor(), ck.select_and_merge(features, scores, 3, 1, grid=(3, 4)).merged)


def refusals(mesh) -> dict:
    """What is called, and the words of the error that both ranks get."""
    features, scores = make_inputs(batch=2, num_tokens=12).args[:2]
    sharded = by_image(mesh)
    f, s = sharded(features, ""), sharded(scores, "")
    other = DeviceMesh("cpu", torch.arange(WORLD_SIZE).reshape(2, 1))
    offsets = sharded(torch.tensor([0, 12, 24], dtype=torch.int32), "")
    packed = (sharded(features.flatten(0, 1), ""), sharded(scores.flatten(), ""), offsets, offsets, offsets, 24, 12)
    out = ck.select_and_merge(f, s, 3, 1, grid=(3, 4))
    return {
        "a plain tensor": (
            lambda: ck.select_and_merge(f, scores, 3, 1, grid=(3, 4)),
            ["scores: expected a DTensor", "got a torch.Tensor", "distribute_tensor(scores, mesh, placements)"],
        ),
        "a plain tensor first": (
            lambda: OPS.similarity(features, s),
            ["keys: expected a DTensor", "distribute_tensor(keys, mesh, placements)"],
        ),
        "two meshes": (
            lambda: OPS.similarity(f, distribute_tensor(scores, other, [Shard(0), Replicate()])),
            ["scores: expected a DTensor on DeviceMesh((2,)", "as keys is, got one on DeviceMesh((2, 1)", "one mesh"],
        ),
        "batches that differ": (
            lambda: OPS.similarity(f, sharded(torch.rand(3, 12), "")),
            ["scores: expected B = 2 images, as keys has, got shape [3, 12]"],
        ),
        "packed": (
            lambda: ck.select_and_merge_varlen(*packed, spatial_weight=0),
            ["select_and_merge_varlen: expected plain tensors, got DTensors", "offsets", "tensor.to_local()"],
        ),
        "workspace_bytes": (
            lambda: ck.workspace_bytes(f, s, 3, 1, grid=(3, 4)),
            ["workspace_bytes: expected plain tensors, got DTensors", "tensor.to_local()"],
        ),
        "out": (
            lambda: ck.select_and_merge(f, s, 3, 1, grid=(3, 4), out=out),
            ["select_and_merge_out: expected plain tensors, got DTensors", "out= and workspace="],
        ),
    }


@case
def what_is_refused(mesh):
    for name, (call, words) in refusals(mesh).items():
        with pytest.raises(RuntimeError) as info:
            call()
        assert all(word in str(info.value) for word in words), f"{name}: {info.value}"


@case
def ranks_outside_of_the_mesh_are_told(mesh):
    """Last, as the ranks part here."""
    alone = DeviceMesh("cpu", [0])
    keys = DTensor.from_local(torch.randn(2, 6, 3), alone, [Shard(0)])
    if dist.get_rank() == 0:
        assert OPS.similarity(keys)[0].shape == (2, 6, 6)
        return
    with pytest.raises(RuntimeError, match="similarity: this rank is not in DeviceMesh"):
        OPS.similarity(keys)


@pytest.mark.parametrize("call", ["condense_kernels.merge", "torch.ops.condense.merge"])
def test_rules_come_in_by_themselves(call, tmp_path):
    """Where DTensor is imported after the package, which itself does not: that takes half a second."""
    code = f"""if True:
        import sys, torch, condense_kernels
        assert "torch.distributed.tensor" not in sys.modules
        from torch.distributed.tensor import DeviceMesh, DTensor, Shard
        torch.distributed.init_process_group("gloo", "file://{tmp_path}/rendezvous", rank=0, world_size=1)
        mesh = DeviceMesh("cpu", [0])
        rows = torch.tensor([[0, 0, 0, 1, 1, 1]] * 2)
        tensors = torch.rand(2, 6, 3), torch.rand(2, 6), torch.tensor([[1, 4]] * 2), rows
        merged, _ = {call}(*(DTensor.from_local(t, mesh, [Shard(0)]) for t in tensors))
        assert torch.equal(merged.to_local(), condense_kernels.merge(*tensors)[0])
        torch.distributed.destroy_process_group()
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def load_example(name: str):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_script(*command, **environment) -> None:
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(
        [sys.executable, *map(str, command)], env=environment, capture_output=True, text=True, timeout=SECONDS
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture
def one_thread():
    """As in the examples' processes: the convolution's bits may depend on it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_torchrun_example(tmp_path, one_thread):
    """A run that was stopped after shard 0: the two ranks share the other three, and leave that one alone."""
    example = load_example("condense_dataset_torchrun")
    args = argparse.Namespace(output=tmp_path, images=26, shard_size=8, keep=9)
    example.check_settings(args)
    (tmp_path / "shard-000000.npz").write_text("done before")
    logs = tmp_path / "logs"  # a file for each rank: on a terminal their lines may mix
    run_script(
        *("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, "--log-dir", logs, "--redirects", 3),
        *(example.__file__, tmp_path, "--images", 26, "--shard-size", 8, "--keep", 9),
    )
    for rank, shards in enumerate([[2], [1, 3]]):
        (said,) = logs.glob(f"*/attempt_0/{rank}/stdout.log")
        done = [line for line in said.read_text().splitlines() if line.startswith("rank")]
        assert done == [f"rank {rank}: shard-00000{shard}.npz" for shard in shards]
    assert (tmp_path / "shard-000000.npz").read_text() == "done before"
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert [shard["first_image"] for shard in manifest] == [0, 8, 16, 24]
    for shard in manifest[1:]:
        first = shard["first_image"]
        with torch.inference_mode():
            expected = example.condense(example.load(range(first, min(first + 8, 26))), example.Encoder(), keep=9)
        with numpy.load(tmp_path / shard["file"]) as arrays:
            assert set(arrays) == {"merged", "indices"}
            assert all(numpy.array_equal(arrays[name], expected[name]) for name in arrays)
    args.keep = 10
    with pytest.raises(SystemExit, match=r"settings.json is of another run: .* Remedy: another folder"):
        example.check_settings(args)


@pytest.mark.slow
def test_ray_example(tmp_path, one_thread):
    """Every image once, and condensed as here."""
    import pyarrow.parquet

    example = load_example("condense_dataset_ray")
    run_script(example.__file__, tmp_path, "--images", 26, "--batch-size", 8, "--keep", 9, RAY_AUTH_MODE="disabled")
    rows = [row for path in tmp_path.glob("*.parquet") for row in pyarrow.parquet.read_table(path).to_pylist()]
    assert sorted(row["id"] for row in rows) == [*range(26)]
    expected = example.Condenser(keep=9)(example.load({"id": numpy.array([row["id"] for row in rows])}))
    assert [row["indices"] for row in rows] == expected["indices"].tolist()
    assert numpy.array_equal([row["merged"] for row in rows], expected["merged"].reshape(26, -1))


if __name__ == "__main__":
    run_cases(int(sys.argv[1]), Path(sys.argv[2]))
