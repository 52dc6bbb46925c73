"""Condenses a dataset with Ray Data, which spreads the batches over the machines of its cluster:

    python condense_dataset_ray.py condensed/

Without a cluster Ray starts one on this machine. The encoder is loaded once in each worker (an actor) and stays there.
"""

import argparse
from pathlib import Path

import numpy
import ray
import torch

import condense_kernels as ck

GRID = (12, 12)  # N = 144 tokens


def load(batch: dict[str, numpy.ndarray]) -> dict[str, numpy.ndarray]:
    """Adds image [B, 3, 96, 96] to id [B]. Stands for a dataset: image i is random, and the same whoever asks."""
    images = [torch.rand(3, 96, 96, generator=torch.Generator().manual_seed(int(i))) for i in batch["id"]]
    return {"id": batch["id"], "image": torch.stack(images).numpy()}


class Condenser:
    """What a worker holds. The convolution stands for a vision encoder: images to tokens and their scores."""

    def __init__(self, keep: int, channels: int = 64):
        self.device = "cuda" if torch.cuda.is_available() else "cpu"  # Ray shows a worker the GPUs that it has
        self.keep = keep
        torch.manual_seed(0)
        self.patches = torch.nn.Conv2d(3, channels, kernel_size=8, stride=8).to(self.device)

    @torch.inference_mode()
    def __call__(self, batch: dict[str, numpy.ndarray]) -> dict[str, numpy.ndarray]:
        tokens = self.patches(torch.tensor(batch["image"], device=self.device)).flatten(2).mT  # [B, N, D]
        query = tokens.mean(dim=1, keepdim=True)
        scores = torch.softmax((query @ tokens.mT)[:, 0], dim=1)  # [B, N]
        out = ck.condense(tokens, scores, keep=self.keep, grid=GRID)
        return {"id": batch["id"], "merged": out.merged.half().cpu().numpy(), "indices": out.indices.cpu().numpy()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="folder for the Parquet files, or a URL that Ray can write to")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=32, help="images of a call")
    parser.add_argument("--keep", type=int, default=36, help="tokens of an image that stay")
    parser.add_argument("--workers", type=int, default=1, help="processes that encode and condense")
    parser.add_argument("--gpus", type=float, default=0, help="of each worker")
    args = parser.parse_args()

    images = ray.data.range(args.images).map_batches(load, batch_size=args.batch_size)
    condensed = images.map_batches(
        Condenser,
        fn_constructor_args=(args.keep,),
        batch_size=args.batch_size,
        compute=ray.data.ActorPoolStrategy(size=args.workers),
        num_gpus=args.gpus,
    )
    condensed.write_parquet(str(args.output))


if __name__ == "__main__":
    main()
