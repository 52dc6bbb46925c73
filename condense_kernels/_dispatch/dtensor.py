"""The operators on DTensors: a batch that is sharded by images goes through without communication.

Images do not influence each other, so each rank runs the operator on the images that it holds. Importing this module
puts the rules in; the package does that by itself once torch.distributed.tensor has been imported, which takes half a
second and is left to those who use it.

The rules are torch_dispatch rules and not those of torch.distributed.tensor.experimental.register_sharding: DTensor
never redistributes what is given by keyword, as keys, mask, positions and tier are, and gathers a batch with fewer
images than ranks.
"""

import contextlib
from collections.abc import Callable

import torch

from . import library
from .declaration import OPERATORS

try:
    from torch.distributed.tensor import DTensor, Replicate
except ImportError as error:
    raise ImportError(
        f"condense_kernels.distributed: torch {torch.__version__} has no torch.distributed.tensor ({error}). "
        "Remedy: a torch built with distributed. Without DTensors nothing here is needed."
    ) from error


def on_shards(op: str, kernel: Callable) -> Callable:
    """``kernel`` of ``op``, which given DTensors runs on this rank's images and returns DTensors.

    Along each axis of the mesh the arguments are sharded by images, Shard(0), where one of them is, and replicated
    otherwise. Those that are placed in another way are redistributed. The results are placed like the arguments.
    """

    def run(*args, **kwargs):
        if not any(isinstance(value, DTensor) for value in (*args, *kwargs.values())):
            return kernel(*args, **kwargs)
        positional = [argument.name for argument in library.schema_of(op).arguments[: len(args)]]
        arguments = dict(zip(positional, args, strict=True)) | kwargs
        given = {name: value for name, value in arguments.items() if isinstance(value, torch.Tensor)}
        without_batch = OPERATORS[op].shared
        shared = {name for name, t in given.items() if without_batch.get(name) == t.dim()}
        tensors = as_checked(op, given, shared)
        first = next(iter(tensors.values()))  # [B, ...], as all others but shared
        mesh = first.device_mesh
        axes = zip(*(t.placements for name, t in tensors.items() if name not in shared), strict=True)
        by_image = [next((p for p in axis if p.is_shard(0)), Replicate()) for axis in axes]
        everywhere = [Replicate()] * mesh.ndim

        def as_dtensor(local: torch.Tensor) -> DTensor:  # contiguous: B is in none of its strides
            shape = torch.Size((first.shape[0], *local.shape[1:]))
            return DTensor.from_local(local, mesh, by_image, shape=shape, stride=local.stride())

        with torch.no_grad():  # autograd has had its turn
            for name, tensor in tensors.items():
                placements = everywhere if name in shared else by_image
                arguments[name] = tensor.redistribute(placements=placements).to_local()
            results = kernel(*(arguments[name] for name in positional), **{name: arguments[name] for name in kwargs})
            return library.as_returned(op, tuple(map(as_dtensor, library.listed(results))))

    return run


def as_checked(op: str, given: dict[str, torch.Tensor], shared: set[str]) -> dict[str, DTensor]:
    """Looks for what a rank's own part would not show, so that all ranks raise the same error before they
    communicate."""
    reason = OPERATORS[op].no_shards
    if reason is not None:
        raise RuntimeError(
            f"{op}: expected plain tensors, got DTensors: {reason}. Remedy: call it on tensor.to_local(), each rank on "
            "images of its own."
        )
    tensors: dict[str, DTensor] = {}
    for name, value in given.items():
        if not isinstance(value, DTensor):
            raise RuntimeError(
                f"{name}: expected a DTensor, as others are, got a torch.Tensor, which may be the whole or a part. "
                f"Remedy: distribute_tensor({name}, mesh, placements) of the whole, DTensor.from_local of a part."
            )
        tensors[name] = value
    (name_of_first, first), *others = tensors.items()
    if first.device_mesh.get_coordinate() is None:
        raise RuntimeError(f"{op}: this rank is not in {first.device_mesh}. Remedy: call it on the ranks of the mesh.")
    for name, tensor in others:
        if tensor.device_mesh != first.device_mesh:
            raise RuntimeError(
                f"{name}: expected a DTensor on {first.device_mesh}, as {name_of_first} is, got one on "
                f"{tensor.device_mesh}. Remedy: one mesh for all arguments."
            )
        if name not in shared and tensor.shape[:1] != first.shape[:1]:
            raise RuntimeError(
                f"{name}: expected B = {first.shape[0]} images, as {name_of_first} has, got shape {list(tensor.shape)}."
            )
    return tensors


def register(op: str) -> None:
    run = on_shards(op, getattr(library.OPS, op).default)

    def rule(cls, func, types, args=(), kwargs=None):
        return run(*args, **(kwargs or {}))

    with contextlib.suppress(RuntimeError):  # another copy of the package has put its rule in
        torch.library.register_torch_dispatch(f"{library.NAMESPACE}::{op}", DTensor, rule, lib=library.registry)


for _op in OPERATORS:
    register(_op)
