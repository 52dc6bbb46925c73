"""The adapters, each in a stand-in of its host's interface, and beside the host's loop restated."""

import ast
import sys
from pathlib import Path

import bench_adapters
import pytest
import shapes
import torch
from hosts import (
    Llava,
    QwenVl,
    Tower,
    angelslim_context,
    apply_merging,
    apply_pruning,
    attentive,
    divprune_loop,
    dpp_loop,
    evs_loop,
    idpruner_loop,
    nearest_loop,
    placed,
    random,
    segments,
    visual,
)

import condense_kernels as ck
from condense_kernels import methods
from condense_kernels.adapters import (
    angelslim,
    llava,
    visionzip,
    vllm_evs,
)
from condense_kernels.methods import condensevlm, divprune, fastervlm, topk_merge

HALVES = (torch.float32, torch.bfloat16, torch.float16)
DTYPES = pytest.mark.parametrize("dtype", HALVES, ids=str)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# AngelSlim


@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.75, 0.999, 1.0])
def test_angelslim_pruning_keeps_what_the_loop_keeps(ratio):
    context = angelslim_context(5, 40, 4, 20, 3, images=(1, 3))
    rows, mask = apply_pruning(context, angelslim.pruning_strategy(divprune, visual=visual), {"ratio": ratio})
    n, tokens = 60, context.inputs_embeds[0, visual(context)]
    keep = max(round(n * (1 - ratio)), int(ratio < 1))
    assert rows.shape[1] == 12 + keep and mask[0, ~visual(context)].all()
    kept = mask[0, visual(context)].nonzero()[:, 0].tolist()
    assert kept == ([] if keep == 0 else list(range(n)) if keep == n else divprune_loop(tokens, keep))


def test_angelslim_idpruner_keeps_what_the_loop_keeps():
    context, scores = angelslim_context(3, 40, 2, images=(1,)), torch.rand(1, 40)
    prune = angelslim.pruning_strategy(methods.idpruner, visual=visual, scores=lambda _: scores)
    _, mask = apply_pruning(context, prune, {"ratio": 0.7, "balance": 0.6})
    assert mask[0, 3:43].nonzero()[:, 0].tolist() == idpruner_loop(context.inputs_embeds[0, 3:43], scores[0], 12, 0.6)


@DTYPES
def test_angelslim_options_are_those_of_params(dtype):
    context = angelslim_context(2, 64, 2, images=(1,), dtype=dtype)
    scores = torch.rand(1, 64)
    prune = angelslim.pruning_strategy(condensevlm, visual=visual, scores=lambda _: scores)
    _, mask = apply_pruning(context, prune, {"ratio": 0.5, "grid": (8, 8), "background_ratio": 0.5})
    expected = condensevlm(context.inputs_embeds[:, 2:66], scores, 32, grid=(8, 8), background_ratio=0.5)
    assert torch.equal(mask[0, 2:66].nonzero()[:, 0], expected.indices[0])


def test_angelslim_merging_has_the_weights_of_the_loop():
    context = angelslim_context(5, 40, 4, 20, 3, images=(1, 3))
    scores = [torch.rand(1, 40), torch.rand(1, 20)]
    strategy = angelslim.merging_strategy(topk_merge, segments=segments, scores=lambda _: scores)
    weights, sizes, is_visual, mask = strategy(context, ratio=0.6)
    assert sizes.tolist() == [5, 40, 4, 20, 3] and is_visual.tolist() == [False, True, False, True, False]
    for w, a, start in zip(weights, scores, (5, 49), strict=True):
        tokens = context.inputs_embeds[0, start : start + a.shape[1]]
        expected, kept = nearest_loop(tokens, a[0], round(0.4 * len(tokens)))
        torch.testing.assert_close(w, expected)
        assert mask[start : start + len(tokens)].nonzero()[:, 0].tolist() == kept
    merged, _ = apply_merging(context, strategy, {"ratio": 0.6})
    torch.testing.assert_close(merged[0, 5:21], topk_merge(context.inputs_embeds[:, 5:45], scores[0], 16).merged[0])


@DTYPES
@pytest.mark.parametrize("name", ["condensevlm", "divprune", "fastervlm", "random_merge"])
def test_angelslim_merging_gives_the_methods_rows(name, dtype):
    context = angelslim_context(3, 36, 2, images=(1,), dtype=dtype)
    scores, method = torch.rand(1, 36), methods.METHODS[name].call
    options = {"generator": torch.Generator().manual_seed(1)}
    strategy = angelslim.merging_strategy(method, segments=segments, scores=lambda _: [scores])
    merged, mask = apply_merging(context, strategy, {"ratio": 0.75, **options})
    options = {"generator": torch.Generator().manual_seed(1)}
    expected = method(context.inputs_embeds[:, 3:39], scores, 9, **options)
    assert mask.tolist() == [True] * 3 + [i in expected.indices[0] for i in range(36)] + [True] * 2
    torch.testing.assert_close(merged[:, 3:12], expected.merged, atol=8 * torch.finfo(dtype).eps, rtol=0.0)
    assert merged.dtype == dtype


def test_angelslim_merging_refuses_weights_that_are_not_the_methods():
    """Pooling is a mean whatever the scores are."""
    context = angelslim_context(1, 16, images=(1,))
    strategy = angelslim.merging_strategy(
        methods.pooling, segments=segments, scores=lambda _: [torch.linspace(0.1, 1, 16)[None]]
    )
    with pytest.raises(ValueError, match=r"^method: expected one that .* got pooling"):
        strategy(context, ratio=0.75, grid=(4, 4))

    def one_row_else(*call, **options):
        found = fastervlm(*call, **options)
        return found._replace(merged=found.merged.index_fill(1, torch.tensor(2), 0))

    with pytest.raises(ValueError, match=r"^method: expected one that .* got one_row_else"):
        angelslim.merging_strategy(one_row_else, segments=segments, scores=lambda _: [torch.rand(1, 16)])(
            context, ratio=0.5
        )
    context.inputs_embeds[0, 4] = torch.nan  # what a NaN does to a product is no reason
    angelslim.merging_strategy(fastervlm, segments=segments, scores=lambda _: [torch.rand(1, 16)])(context, ratio=0.5)


def test_angelslim_errors():
    context = angelslim_context(2, 16, images=(1,))
    prune = angelslim.pruning_strategy(divprune, visual=visual)
    with pytest.raises(ValueError, match=r"^1 - ratio: expected a number in \[0, 1\], got -0.5"):
        prune(context, ratio=1.5)
    with pytest.raises(TypeError, match="ratio"):
        prune(context)
    merging = angelslim.merging_strategy(divprune, segments=lambda _: ([3, 16], [False, True]))
    with pytest.raises(ValueError, match=r"^segments: expected lengths whose sum is 18, got 19"):
        merging(context, ratio=0.5)
    text = angelslim_context(9, images=())
    assert prune(text, ratio=0.5).all()
    weights, *_, mask = angelslim.merging_strategy(divprune, segments=segments)(text, ratio=0.5)
    assert weights == [] and mask.all()
    context.inputs_embeds = random(2, 18, 4)
    for strategy in (prune, merging):
        with pytest.raises(ValueError, match=r"^inputs_embeds: expected one sequence .* got \[2, 18, 4\]"):
            strategy(context, ratio=0.5)


# Forks of LLaVA


@pytest.mark.parametrize("b", [1, 3])
def test_llava_fastervlm_keeps_what_the_loop_keeps(b):
    model = Llava(*attentive(b), keep=12)
    features, masks, attentions = llava.encode_images(fastervlm)(model, "images")
    assert attentions is model.outputs[1] and features.shape == (b, 49, 12) and masks.dtype == torch.bool
    top = model.outputs[1].mean(dim=1).topk(12, dim=1).indices
    assert torch.equal(masks, torch.zeros_like(masks).scatter(1, top, True))
    torch.testing.assert_close(features[masks], model.mm_projector(model.outputs[0])[masks])


@DTYPES
def test_llava_hands_over_merged_rows(dtype):
    """In picture order, among zeros, in the model's dtype, each image as alone."""
    model = Llava(*attentive(3, dtype=dtype), keep=12)
    encode = llava.encode_images(condensevlm, result="masks", grid=(7, 7))
    rows = model.rows(encode)
    expected = condensevlm(model.outputs[0], model.outputs[1].mean(dim=1), 12, grid=(7, 7))
    assert rows.dtype == dtype and len(encode(model, "images")) == 2
    torch.testing.assert_close(rows, model.mm_projector(expected.merged).detach())
    for image in range(3):
        alone = Llava(*(x[image : image + 1] for x in model.outputs), keep=12)
        alone.mm_projector = model.mm_projector
        _, mask = encode(alone, "image")
        assert torch.equal(mask[0].nonzero()[:, 0], expected.indices[image])


def test_llava_gradients_reach_what_stays():
    features, attentions = attentive(2)
    model = Llava(features.requires_grad_(), attentions, keep=12)
    whole, mask = llava.encode_images(fastervlm, result="masks")(model, "images")
    assert not whole[~mask].any()
    whole[mask].sum().backward()
    assert torch.equal(features.grad.any(dim=-1), mask) and model.mm_projector[0].weight.grad.any()


def test_llava_rows_and_a_count():
    model = Llava(*attentive(2), keep=12)
    asked = {"output_attentions": True}
    rows, count = llava.encode_images(topk_merge, result="rows", keep=9, tower_options=asked)(model, "images")
    assert rows.shape == (2, 9, 12) and count == 9 and model.asked == asked
    expected = topk_merge(model.outputs[0], model.outputs[1].mean(dim=1), 9)
    torch.testing.assert_close(rows, model.mm_projector(expected.merged))


def test_llava_cdpruner_keeps_what_the_loop_keeps():
    """Its tower, its projected features, its relevance; of one image, as the loop scales over the batch."""
    features, images, texts = random(1, 49, 24), random(1, 49, 16), random(3, 16)
    model = Llava(features, images, texts, keep=5, width=40)
    model.visual_token_num = 11
    encode = llava.encode_images(
        methods.cdpruner,
        scores=llava.relevance,
        keep=lambda self: self.visual_token_num,
        result="masks",
        projected=True,
    )
    whole, mask = encode(model, "images", "texts")
    assert model.asked == {"texts": "texts"}
    with torch.no_grad():
        projected = model.mm_projector(features)[0].double()
    unit = lambda x: x / x.norm(dim=-1, keepdim=True)  # noqa: E731
    relevance = -(unit(images[0]) @ unit(texts).T).mean(dim=1).double()
    relevance = (relevance - relevance.min() + 1e-6) / (relevance.max() - relevance.min())
    kernel = relevance[:, None] * (unit(projected) @ unit(projected).T) * relevance
    assert mask[0].nonzero()[:, 0].tolist() == dpp_loop(kernel, 11)
    torch.testing.assert_close(whole[mask].double(), projected[mask[0]], atol=1e-6, rtol=1e-5)
    both = llava.relevance(random(2, 9, 1), images[:, :9].repeat(2, 1, 1) * torch.tensor([1, 9]).view(2, 1, 1), texts)
    assert torch.equal(both[0], both[1]) or torch.allclose(both[0], both[1])
    assert torch.equal(llava.relevance(features, torch.zeros(1, 49, 16), texts), torch.ones(1, 49))


def test_llava_errors():
    with pytest.raises(ValueError, match=r"^result: expected one of attentions, masks, rows, got 'mask'"):
        llava.encode_images(divprune, result="mask")
    with pytest.raises(ValueError, match=r"^keep: expected 1 <= keep <= 49"):
        llava.encode_images(divprune)(Llava(*attentive(1), keep=50), "images")


# VisionZip


@DTYPES
@pytest.mark.parametrize("without_place", [0, 3])
def test_visionzip_tower(without_place, dtype):
    tower, images = Tower(2, dtype=dtype), torch.tensor([[0.0], [1.0]], dtype=dtype)
    forward = visionzip.tower_forward(topk_merge, 10, use_metric=True, without_place=without_place)
    hidden, places = forward(tower, images)
    assert hidden.shape == (2, 10, 24) and hidden.dtype == dtype and places.shape == (2, 10 - without_place)
    assert places[:, 0].tolist() == [0, 0] and torch.equal(hidden[:, 0], tower.hidden[-2][:, 0])
    scores = tower.attentions[-2][:, :, 0, 1:].sum(dim=1)
    keys = tower.vision_model.encoder.layers[-2].metric[:, 1:]
    expected = topk_merge(tower.hidden[-2][:, 1:], scores, 9, keys=keys)
    grid, mask, rest = placed(hidden, places)
    for image in range(2):
        least = expected.mass[image].argsort(stable=True)[:without_place]
        left = torch.ones(9, dtype=torch.bool).index_fill(0, least, False)
        assert torch.equal(mask[image].nonzero()[:, 0], expected.indices[image][left])
        assert torch.equal(grid[image][mask[image]], expected.merged[image][left])
        assert torch.equal(rest[image], expected.merged[image][~left])


def test_visionzip_keeps_the_dominant_tokens_of_the_loop():
    tower = Tower(2)
    _, places = visionzip.tower_forward(fastervlm, 10)(tower, torch.tensor([[0.0], [1.0]]))
    top = tower.attentions[-2].sum(dim=1)[:, 0, 1:].topk(9, dim=1).indices + 1
    assert torch.equal(places[:, 1:], top.sort(dim=1).values)


def test_visionzip_images_of_a_list_and_errors():
    tower = Tower(2)
    forward = visionzip.tower_forward(condensevlm, 10, grid=(6, 6))
    hidden, places = forward(tower, [torch.tensor([0.0]), torch.tensor([1.0])])
    together = forward(tower, torch.tensor([[0.0], [1.0]]))
    assert torch.equal(torch.cat(hidden), together[0]) and torch.equal(torch.cat(places), together[1])
    with pytest.raises(ValueError, match=r"^without_place: expected 0 <= without_place < 9, got 9"):
        visionzip.tower_forward(fastervlm, 10, without_place=9)
    with pytest.raises(ValueError, match=r"^keep: expected 1 <= keep <= 36"):
        visionzip.tower_forward(fastervlm, 1)(tower, torch.tensor([[0.0]]))


# vLLM


@pytest.mark.parametrize("q", [0.0, 0.3, 0.55, 0.99])
@pytest.mark.parametrize("thw", [(1, 4, 6), (5, 4, 6), (7, 8, 2)])
def test_vllm_keeps_what_the_loop_keeps(q, thw):
    n = thw[0] * thw[1] * thw[2] // 4
    video = random(n, 16)
    mask = QwenVl(vllm_evs.retention_mask(fastervlm), q).embed(video, thw, 2)
    assert torch.equal(mask, evs_loop(video, thw, 2, q))


@DTYPES
@pytest.mark.parametrize("name", ["condensevlm", "divprune", "random"])
def test_vllm_counts_with_any_method(name, dtype):
    """Also of a video that stands still, or is black."""
    model = QwenVl(vllm_evs.retention_mask(methods.METHODS[name].call), 0.7)
    for video in (random(48, 8, dtype=dtype), random(12, 8, dtype=dtype).repeat(4, 1), torch.zeros(48, 8, dtype=dtype)):
        model.embed(video, torch.tensor([4, 6, 8]), 2)
    gridded = vllm_evs.retention_mask(condensevlm, grid=(4, 3, 4))
    assert QwenVl(gridded, 0.5).embed(random(48, 8, dtype=dtype), (4, 6, 8), 2)[:12].all()  # first frames first


def test_vllm_errors():
    mask = vllm_evs.retention_mask(fastervlm)
    with pytest.raises(ValueError, match=r"^video_size_thw: expected sizes of 47 tokens, got 4 x 3 x 4"):
        mask(random(47, 8), (4, 6, 8), 2, 0.5)
    with pytest.raises(ValueError, match=r"^video_size_thw"):
        mask(random(0, 8), (0, 6, 8), 2, 0.5)
    with pytest.raises(ValueError, match=r"^q: expected 0 <= q < 1, the share that leaves, got 1"):
        mask(random(48, 8), (4, 6, 8), 2, 1)


# OpenVINO: hosts in C++ hold theirs to our operator, or to the golden vectors


def test_openvino_selects_what_dpp_select_does():
    features, relevance = random(3, 40, 48).double(), torch.rand(3, 40, dtype=torch.float64)
    s = ck.similarity(features)[0]
    kernel = 0.4 * s + 0.6 * relevance[:, :, None] * s * relevance[:, None]
    found = ck.dpp_select(kernel, None, 13).sort(dim=1).values
    assert found.tolist() == [dpp_loop(image, 13) for image in kernel]


# All of them


def test_what_the_benchmark_times_gives_the_same_tokens():
    features, scores = shapes.make(shapes.keeping(1, bench_adapters.GRID, 64))
    cases = [case for host in bench_adapters.HOSTS for case in host(features[0], scores[0], 64)]
    assert len(cases) == 10
    for case in cases:
        assert case.same(case.theirs(), case.ours()), case.interface


FILES = sorted(Path(angelslim.__file__).parent.glob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_no_host_is_imported(path):
    imports = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, (ast.Import, ast.ImportFrom))]
    absolute = [alias.name for node in imports if isinstance(node, ast.Import) for alias in node.names]
    absolute += [node.module for node in imports if isinstance(node, ast.ImportFrom) and node.level == 0]
    assert {name.split(".")[0] for name in absolute} <= {"torch", *sys.stdlib_module_names}


@pytest.mark.parametrize("path", [path for path in FILES if path.stem not in ("__init__", "common")], ids=str)
def test_every_adapter_names_the_file_of_its_host(path):
    assert ".py" in ast.get_docstring(ast.parse(path.read_text()))
