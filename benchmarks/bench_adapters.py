"""The adapters beside the loops of their hosts that they replace: prints the table of docs/adapters.md.

python benchmarks/bench_adapters.py [--rounds 21]

One thread, the process' CPU time, both sides in turn, medians; first both give the same tokens. The loops are
restated in the steps of the hosts' code: one image of 576 tokens with 1024 channels, fp32, from features to what the
host goes on with; no model and no projector is in the times.
"""

import argparse
import statistics
import time
import types
from collections.abc import Callable, Iterator
from typing import NamedTuple

import baselines
import torch
import torch.nn.functional as F
from rows import commit
from shapes import keeping, make

import condense_kernels as ck
from condense_kernels import methods
from condense_kernels.adapters import angelslim, keep_list, llava, tome, uniprunebench, visionzip, vllm_evs
from condense_kernels.methods.registry import Method
from condense_kernels.methods.results import rows

GRID, D, BEFORE, BEHIND, FRAMES = (24, 24), 1024, 35, 25, 16
N = GRID[0] * GRID[1]


class Case(NamedTuple):
    interface: str
    loop: str
    theirs: Callable[[], object]
    ours: Callable[[], object]
    same: Callable[[object, object], bool]


def equal(theirs: torch.Tensor, ours: torch.Tensor) -> bool:
    return torch.equal(theirs, ours)


def near(theirs: torch.Tensor, ours: torch.Tensor) -> bool:
    return theirs.shape == ours.shape and torch.allclose(theirs, ours, atol=1e-5)


def marked(kept: torch.Tensor, n: int) -> torch.Tensor:
    return torch.zeros(n, dtype=torch.bool).index_fill(0, kept, True)


def cosines(x: torch.Tensor) -> torch.Tensor:
    z = F.normalize(x, dim=-1)
    return z @ z.T


# VisionZip, as the host's tower has it


def of_visionzip(dominant: int) -> Method:
    """Its contextual rows are the last; as in the host, a mean with the centre within."""

    def method(features, scores, keep, *, keys=None, **_) -> ck.Condensed:
        order = scores.sort(dim=-1, descending=True, stable=True).indices
        chosen, rest = order[:, :dominant].sort().values, order[:, dominant:].sort().values
        count = keep - dominant
        centres = rest[:, :: rest.shape[1] // count][:, :count]
        sources = torch.ones_like(scores, dtype=torch.bool).scatter(1, chosen, False)
        assignment = ck.assign(keys=keys, indices=centres, sources=sources, spatial_weight=0)
        context, _ = ck.merge(features, None, centres, assignment)
        merged = torch.cat([rows(features, chosen), context], dim=1)
        mass = torch.cat([scores.new_ones(1, dominant), scores.new_zeros(1, count)], dim=1)
        return ck.Condensed(merged, torch.cat([chosen, centres], dim=1), None, mass)

    return method


# Cases


def of_angelslim(x: torch.Tensor, scores: torch.Tensor, k: int) -> Iterator[Case]:
    places = F.pad(torch.ones(N, dtype=torch.bool), (BEFORE, BEHIND))
    embeds = F.pad(x, (0, 0, BEFORE, BEHIND))[None]
    context, ratio = types.SimpleNamespace(inputs_embeds=embeds), 1 - k / N
    prune = angelslim.pruning_strategy(methods.divprune, visual=lambda _: places)

    def loop():  # algorithm/divprune.py
        tokens = embeds[0, places.nonzero()[:, 0]]
        return (~places).index_fill(0, BEFORE + baselines.divprune(cosines(tokens), k), True)[None]

    yield Case("AngelSlim, pruning", "divprune", loop, lambda: prune(context, ratio=ratio), equal)

    lengths = [BEFORE, N, BEHIND], [False, True, False]
    strategy = angelslim.merging_strategy(
        methods.topk_merge, segments=lambda _: lengths, scores=lambda _: [scores[None]]
    )

    def weights():  # the steps of algorithm/visionzip.py, all others into the top-k, by their scores
        tokens = embeds.split(lengths[0], dim=1)[1][0]
        kept = scores.topk(k).indices.sort().values
        z = F.normalize(tokens, dim=-1)
        rest = (~marked(kept, N)).nonzero()[:, 0]
        row = (z[rest] @ z[kept].T).max(dim=1).indices
        w = torch.zeros(k, N)
        w[torch.arange(k), kept] = scores[kept]
        w.index_put_((row, rest), scores[rest], accumulate=True)
        return w / w.sum(dim=1, keepdim=True)

    yield Case(
        "AngelSlim, merging", "W of top-k and merge", weights, lambda: strategy(context, ratio=ratio)[0][0], near
    )


def of_llava(x: torch.Tensor, scores: torch.Tensor, k: int) -> Iterator[Case]:
    attentions = scores.expand(1, 16, N).contiguous()
    nothing = torch.nn.Identity()
    tower = types.SimpleNamespace(mm_projector=nothing, get_vision_tower=lambda: lambda images: (x[None], attentions))
    model = types.SimpleNamespace(get_model=lambda: tower, get_visual_token_num=lambda: k)
    encode = llava.encode_images(methods.fastervlm)

    def indexed(encoded):  # what prepare_inputs_labels_for_multimodal goes on with
        return encoded[0][encoded[1]]

    def top_k():
        kept = attentions.mean(dim=1).topk(k, dim=1).indices
        return x[None][torch.zeros(1, N, dtype=torch.bool).scatter_(1, kept, True)]

    yield Case("encode_images, FasterVLM", "top-k", top_k, lambda: indexed(encode(model, "images")), equal)

    relevance = baselines.cdpruner_relevance(scores)
    with_text = llava.encode_images(methods.cdpruner, scores=lambda *_: relevance[None], result="masks")

    def map_inference():
        return x[baselines.cdpruner_from_features(x, relevance, k).sort().values]

    yield Case(
        "encode_images, CDPruner", "MAP of a DPP", map_inference, lambda: indexed(with_text(model, "images")), equal
    )


def of_visionzip_tower(x: torch.Tensor, scores: torch.Tensor, k: int) -> Iterator[Case]:
    hidden, contextual = F.pad(x, (0, 0, 1, 0))[None], 10
    attention = torch.zeros(1, 16, 1 + N, 1 + N)
    attention[:, :, 0, 1:] = scores / 16
    metric = F.pad(x[:, :64], (0, 0, 1, 0))[None]
    vision_model = types.SimpleNamespace(encoder=types.SimpleNamespace(layers=[types.SimpleNamespace(metric=metric)]))

    class Tower:
        device, dtype, select_layer = x.device, x.dtype, 0

        def vision_tower(self, images, **_):
            return types.SimpleNamespace(hidden_states=[hidden], attentions=[attention])

        vision_tower.vision_model = vision_model

    dominant = k - contextual
    forward = visionzip.tower_forward(of_visionzip(dominant - 1), k, use_metric=True, without_place=contextual)

    def loop():
        order = attention[:, :, 0, 1:].sum(dim=1)[0].topk(dominant - 1).indices + 1
        keep = F.pad(order, (1, 0))
        left = torch.ones(1 + N, dtype=torch.bool).index_fill_(0, keep, False)
        z, tokens = metric[0, left], hidden[0, left]
        z = z / z.norm(dim=-1, keepdim=True)
        target = torch.arange(0, len(z), max(1, len(z) // contextual))[:contextual]
        others = ~torch.isin(torch.arange(len(z)), target)
        one_hot = torch.zeros(int(others.sum()), contextual)
        one_hot.scatter_(1, (z[others] @ z[target].T).argmax(dim=1, keepdim=True), 1)
        context = (one_hot.T @ tokens[others] + tokens[target]) / (1 + one_hot.sum(dim=0))[:, None]
        return torch.cat([hidden[0, ~left], context])[None]

    yield Case("VisionZip tower", "dominant and contextual", loop, lambda: forward(Tower(), x[:1])[0], near)


def of_keep_lists(x: torch.Tensor, scores: torch.Tensor, k: int) -> Iterator[Case]:
    embeds = F.pad(x, (0, 0, BEFORE, BEHIND))[None]
    length = embeds.shape[1]

    def as_published(tokens):
        return baselines.divprune_as_published(cosines(tokens), k)

    def listed():
        kept = as_published(embeds[0, BEFORE : BEFORE + N]) + BEFORE
        kept = torch.cat([torch.arange(BEFORE), kept, torch.arange(BEFORE + N, length)]).sort().values
        return embeds[:, kept]

    yield Case(
        "keep list, LightCompress", "DivPrune as published", listed,
        lambda: keep_list.keep_list(methods.divprune, embeds, BEFORE, N, k).inputs_embeds, equal,
    )  # fmt: skip

    selected = F.pad(torch.ones(N, dtype=torch.bool), (BEFORE, BEHIND))
    prune = uniprunebench.pre_llm(methods.divprune, k / N)

    def pre_llm():
        kept = selected.clone()
        kept[kept.nonzero()[0, 0] + k :] = False
        return x[as_published(x).sort().values]

    yield Case("UniPruneBench", "DivPrune as published", pre_llm, lambda: prune(selected, x[None])[1], equal)


def of_tome(x: torch.Tensor, scores: torch.Tensor, r: int) -> Iterator[Case]:
    size, metric = torch.ones(1, N, 1), x[None, :, :64].contiguous()

    def matched(a, b):
        strength, best = (F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).mT).max(dim=-1)
        order = strength.argsort(dim=-1, descending=True)[..., None]
        gone, left = order[:, :r], order[:, r:]
        return gone, left, best[..., None].gather(1, gone)

    def merged(x, parts, reduce, found):
        (src, dst), (gone, left, into) = parts(x), found
        c = x.shape[-1]
        dst = dst.scatter_reduce(1, into.expand(-1, -1, c), src.gather(1, gone.expand(-1, -1, c)), reduce=reduce)
        return torch.cat([src.gather(1, left.expand(-1, -1, c)), dst], dim=1)

    def halves(x):
        return x[:, ::2], x[:, 1::2]

    def step():
        found = matched(*halves(metric))
        total, sizes = (merged(t, halves, "sum", found) for t in (x[None] * size, size))
        return total / sizes

    def ours():
        merge, _ = tome.bipartite_soft_matching(metric, r)
        return tome.merge_wavg(merge, x[None], size)[0]

    def same(theirs, ours):  # rows are in another order
        by_first = [t[0][t[0, :, 0].argsort()] for t in (theirs, ours)]
        return near(*by_first)

    yield Case(f"ToMe, r = {r}", "match and merge_wavg", step, ours, same)

    corner = torch.arange(N).view(GRID)[::2, ::2].flatten()
    others = (~marked(corner, N)).nonzero()[:, 0]

    def windows(x):
        return x[:, others], x[:, corner]

    yield Case(
        f"tomesd, r = {r}", "match and merge", lambda: merged(x[None], windows, "mean", matched(*windows(x[None]))),
        lambda: tome.bipartite_soft_matching_random2d(x[None], *GRID, 2, 2, r, no_rand=True)[0](x[None]), same,
    )  # fmt: skip


def of_vllm(x: torch.Tensor, scores: torch.Tensor, k: int) -> Iterator[Case]:
    thw, q = (FRAMES, 12, 12), 1 - (k + 0.5) / N  # windows of 2 x 2 are merged: 36 tokens a frame
    keep = vllm_evs.retention_mask(methods.fastervlm)

    def loop():
        frames = x.view(FRAMES, -1, D)
        change = 1 - F.cosine_similarity(frames[1:], frames[:-1], dim=-1)
        change = F.pad(change, (0, 0, 1, 0), value=255).flatten()
        return marked(change.argsort(descending=True, stable=True)[:k], N)

    yield Case("vLLM, compute_retention_mask", "EVS", loop, lambda: keep(x, thw, 2, q), equal)


HOSTS = (of_angelslim, of_llava, of_visionzip_tower, of_keep_lists, of_tome, of_vllm)


def cpu_ms(call: Callable[[], object]) -> float:
    start = time.process_time()
    call()
    return (time.process_time() - start) * 1e3


def measured(case: Case, rounds: int) -> tuple[float, float]:
    """Medians; who is first changes from round to round."""
    if not case.same(case.theirs(), case.ours()):
        raise SystemExit(f"{case.interface}, {case.loop}: not the same tokens. Nothing is timed.")
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(rounds):
        for side in (0, 1) if turn % 2 else (1, 0):
            times[side].append(cpu_ms((case.theirs, case.ours)[side]))
    return statistics.median(times[0]), statistics.median(times[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=21, help="calls of a side (%(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    features, scores = make(keeping(1, GRID, 64, channels=D))
    found: dict[tuple[str, str], list[str]] = {}
    with torch.inference_mode():
        for host in HOSTS:
            for k in (64, 192):
                for case in host(features[0], scores[0], k):
                    name = case.interface.replace(f", r = {k}", "")
                    cells = found.setdefault((name, case.loop), [])
                    cells += [f"{ms:.2f}" for ms in measured(case, arguments.rounds)]
    print(f"N = {N}, D = {D}, fp32, one thread, CPU ms, medians of {arguments.rounds}, at {commit()}\n")
    print("| interface | loop | K = 64: loop | adapter | K = 192: loop | adapter |\n|---|---|---|---|---|---|")
    for names, cells in found.items():
        print("| " + " | ".join([*names, *cells]) + " |")


if __name__ == "__main__":
    main()
