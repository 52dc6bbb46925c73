"""Condenses a dataset, one process per GPU or CPU socket, each with shards of its own:

    torchrun --standalone --nproc-per-node 2 condense_dataset_torchrun.py condensed/

The images are cut into shards of --shard-size; shard i is the work of rank i modulo the number of ranks. A shard is one
file, which appears when it is complete. So a run that was stopped goes on where it was, on any number of ranks.
"""

import argparse
import json
import os
from pathlib import Path

import numpy
import torch
import torch.distributed as dist

import condense_kernels as ck

GRID = (12, 12)  # N = 144 tokens


def load(indices: range) -> torch.Tensor:
    """[B, 3, 96, 96]. Stands for a dataset: image i is random, and the same whoever asks for it."""
    return torch.stack([torch.rand(3, 96, 96, generator=torch.Generator().manual_seed(i)) for i in indices])


class Encoder(torch.nn.Module):
    """Stands for a vision encoder: [B, 3, 96, 96] to tokens [B, N, D] and how much each is attended to [B, N]."""

    def __init__(self, channels: int = 64):
        super().__init__()
        torch.manual_seed(0)
        self.patches = torch.nn.Conv2d(3, channels, kernel_size=8, stride=8)

    def forward(self, images):
        tokens = self.patches(images).flatten(2).mT  # [B, N, D]
        query = tokens.mean(dim=1, keepdim=True)
        return tokens, torch.softmax((query @ tokens.mT)[:, 0], dim=1)


def condense(images: torch.Tensor, encoder: Encoder, keep: int) -> dict[str, numpy.ndarray]:
    out = ck.condense(*encoder(images), keep=keep, grid=GRID)
    return {"merged": out.merged.half().cpu().numpy(), "indices": out.indices.cpu().numpy()}


def write(path: Path, arrays: dict[str, numpy.ndarray]) -> None:
    """Under its name when it is complete, not before."""
    unfinished = path.with_suffix(".unfinished")
    with unfinished.open("wb") as file:
        numpy.savez(file, **arrays)
    unfinished.replace(path)


def check_settings(args: argparse.Namespace) -> None:
    """A run goes on with shards of the same kind only."""
    path = args.output / "settings.json"
    settings = {"images": args.images, "shard_size": args.shard_size, "keep": args.keep}
    if path.exists() and json.loads(path.read_text()) != settings:
        raise SystemExit(f"{path} is of another run: {path.read_text()}. Remedy: another folder, or its settings.")
    path.write_text(json.dumps(settings))


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="folder for the shards")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--shard-size", type=int, default=32, help="images of a file, and of a call")
    parser.add_argument("--keep", type=int, default=36, help="tokens of an image that stay")
    args = parser.parse_args()

    dist.init_process_group("gloo")  # for the two barriers; the work needs no communication
    rank, ranks = dist.get_rank(), dist.get_world_size()
    if rank == 0:
        args.output.mkdir(parents=True, exist_ok=True)
        check_settings(args)
    dist.barrier()

    device = f"cuda:{os.environ['LOCAL_RANK']}" if torch.cuda.is_available() else "cpu"
    encoder = Encoder().to(device)
    firsts = range(0, args.images, args.shard_size)
    paths = [args.output / f"shard-{i:06}.npz" for i in range(len(firsts))]
    for i in range(rank, len(firsts), ranks):
        if paths[i].exists():
            continue
        images = load(range(firsts[i], min(firsts[i] + args.shard_size, args.images)))
        write(paths[i], condense(images.to(device), encoder, args.keep))
        print(f"rank {rank}: {paths[i].name}", flush=True)

    dist.barrier()
    if rank == 0:
        shards = [{"file": path.name, "first_image": first} for path, first in zip(paths, firsts, strict=True)]
        (args.output / "manifest.json").write_text(json.dumps(shards, indent=1))
        print(f"{args.images} images in {len(shards)} shards: {args.output / 'manifest.json'}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
