"""Stand-ins of the hosts of condense_kernels.adapters, and their loops restated, of one image [N, D]."""

import types

import torch
import torch.nn.functional as F


def random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape).to(dtype)


# The loops, of one image [N, D]


def divprune_loop(x, k):
    """The nearest of all picks so far, anew at every step."""
    z = x / x.norm(dim=-1, keepdim=True)
    distance = 1 - z @ z.T
    order = [int(distance.topk(2, dim=0, largest=False).values[1].argmax())]
    while len(order) < k:
        order.append(int(distance[order].amin(dim=0).argmax()))
    return sorted(order)


def idpruner_loop(x, scores, k, balance):
    """Maximal marginal relevance in AngelSlim's steps; the first pick is the most important token."""
    z = F.normalize(x, dim=-1)
    s = z @ z.T
    importance = (scores - scores.min()) / (scores.max() - scores.min() + 1e-6)
    score, nearest, order = importance.clone(), torch.full_like(scores, -2), []
    for _ in range(k):
        score[order] = -torch.inf
        order.append(int(score.argmax()))
        nearest = torch.maximum(nearest, s[order[-1]])
        score = balance * importance - (1 - balance) * nearest
    return sorted(order)


def dpp_loop(kernel, k):
    """Fast greedy MAP, as CDPruner has it, and FastGreedyDPP::select of OpenVINO GenAI."""
    gain, rows, order = kernel.diagonal().clone(), [], []
    for _ in range(k):
        j = int(gain.argmax())
        new = (kernel[j] - sum((c * c[j] for c in rows), torch.zeros_like(gain))) / gain[j].sqrt()
        gain = gain - new**2
        gain[j] = -torch.inf
        rows.append(new)
        order.append(j)
    return sorted(order)


def nearest_loop(x, scores, k):
    """The top-k of scores, every other token in the row of the most similar of them: weights [k, N]."""
    kept = sorted(scores.topk(k).indices.tolist())
    z = F.normalize(x, dim=-1)
    row = (z @ z[kept].T).argmax(dim=1)
    row[kept] = torch.arange(k)
    weights = torch.zeros(k, len(x))
    for token, score in enumerate(scores):
        weights[row[token], token] = score
    return weights / weights.sum(dim=1, keepdim=True), kept


def evs_loop(x, thw, merge, q):
    t, p = thw[0], (thw[1] // merge) * (thw[2] // merge)
    frames = x.view(t, p, -1)
    change = 1 - F.cosine_similarity(frames[1:], frames[:-1], dim=-1)
    change = torch.cat([torch.full((1, p), 255.0), change]).flatten()
    kept = change.argsort(descending=True, stable=True)[: max(p, int(t * p * (1 - q)))]
    return torch.zeros(t * p, dtype=torch.bool).index_fill(0, kept, True)


def tome_loop(metric, r, x, size):
    """One image: rows of merged tokens as {their tokens: mean}."""
    z = metric / metric.norm(dim=-1, keepdim=True)
    strength, best = (z[::2] @ z[1::2].T).max(dim=1)
    into = {2 * int(i): 2 * int(best[i]) + 1 for i in strength.argsort(descending=True)[:r]}
    rows = {}
    for token in range(len(x)):
        rows.setdefault(into.get(token, token), []).append(token)
    return {
        tuple(tokens): (x[tokens] * size[tokens]).sum(0) / size[tokens].sum() for tokens in map(sorted, rows.values())
    }


# AngelSlim

TEXT, IMAGE = 7, 99


def angelslim_context(*lengths: int, images: tuple[int, ...], d: int = 32, dtype=torch.float32):
    ids = torch.cat([torch.full((n,), IMAGE if i in images else TEXT) for i, n in enumerate(lengths)])
    embeds = random(1, len(ids), d, dtype=dtype)
    return types.SimpleNamespace(input_ids=ids[None], inputs_embeds=embeds, lengths=lengths, images=images)


def visual(context):
    return context.input_ids[0] == IMAGE


def segments(context):
    return list(context.lengths), [i in context.images for i in range(len(context.lengths))]


def apply_pruning(context, strategy, params):
    mask = strategy(context, **params)
    assert mask.dtype == torch.bool and mask.shape == context.input_ids.shape
    return context.inputs_embeds[:, mask.view(-1)], mask


def apply_merging(context, strategy, params):
    """W_i times its segment, and every other tensor by the mask."""
    weights, sizes, is_visual, mask = strategy(context, **params)
    rows, given = [], iter(weights)
    for part, of_image in zip(context.inputs_embeds.split(sizes.tolist(), dim=1), is_visual, strict=True):
        rows.append(next(given).to(part.dtype) @ part if of_image else part)
    assert next(given, None) is None
    merged = torch.cat(rows, dim=1)
    assert merged.shape[1] == mask.sum() and mask.shape == context.input_ids[0].shape
    return merged, mask


# Forks of LLaVA


class Llava:
    """What encode_images of the forks uses of self, and what is done with what it returns."""

    def __init__(self, *outputs: torch.Tensor, keep: int, width: int = 12):
        self.outputs, self.keep = outputs, keep
        channels = outputs[0].shape[-1]
        self.mm_projector = torch.nn.Sequential(
            torch.nn.Linear(channels, width), torch.nn.GELU(), torch.nn.Linear(width, width)
        ).to(outputs[0].dtype)

    def get_model(self):
        return self

    def get_vision_tower(self):
        return self.tower

    def tower(self, images, **asked):
        self.asked = asked
        return self.outputs

    def get_visual_token_num(self):
        return self.keep

    @torch.no_grad()
    def rows(self, encode, *texts):
        features, masks, *_ = encode(self, "images", *texts)
        return torch.stack([feature[mask] for feature, mask in zip(features, masks, strict=True)])


def attentive(b: int, n: int = 49, dtype: torch.dtype = torch.float32):
    return random(b, n, 24, dtype=dtype), torch.rand(b, 4, n).to(dtype)


# VisionZip


class Tower:
    dtype, device, select_layer = torch.float32, torch.device("cpu"), -2

    def __init__(self, b: int, n: int = 36, dtype: torch.dtype = torch.float32):
        self.dtype = dtype
        layers = [types.SimpleNamespace(metric=random(b, 1 + n, 8, dtype=dtype)) for _ in range(3)]
        self.vision_model = types.SimpleNamespace(encoder=types.SimpleNamespace(layers=layers))
        self.hidden = [random(b, 1 + n, 24, dtype=dtype) for _ in range(4)]
        self.attentions = [torch.rand(b, 4, 1 + n, 1 + n).to(dtype) for _ in range(3)]
        self.vision_tower = self

    def __call__(self, images, output_hidden_states, output_attentions):
        image = images[:, 0].long()
        return types.SimpleNamespace(
            hidden_states=[h[image] for h in self.hidden], attentions=[a[image] for a in self.attentions]
        )


def placed(hidden, places, n: int = 36):
    """What restore_image_features_sorted does with the rows that have a place, and with those that have none."""
    count = places.shape[1]
    where = places.sort(dim=1).values[:, 1:] - 1
    grid = torch.zeros(len(hidden), n, hidden.shape[2], dtype=hidden.dtype)
    mask = torch.zeros(len(hidden), n, dtype=torch.bool).scatter(1, where, True)
    grid[mask] = hidden[:, 1:count].reshape(-1, hidden.shape[2])
    return grid, mask, hidden[:, count - hidden.shape[1] :] if count < hidden.shape[1] else hidden[:, :0]


# LightCompress


class TokenReductionModule:
    """LightCompress' base class."""

    def __init__(self, config, model, blocks):
        self.config, self.model, self.blocks = config, model, blocks
        self.special_config = config.get("special", {})


class Vlm:
    """LLaVA's prepare_inputs_labels_for_multimodal: padding goes, the image's tokens stand for its placeholder."""

    def __init__(self, image: torch.Tensor):
        self.image = image

    def prepare_inputs_labels_for_multimodal(
        self, input_ids, position_ids, attention_mask, past_key_values, labels, images, image_sizes=None
    ):
        if input_ids.shape[1] == 1:
            return input_ids, position_ids, attention_mask, past_key_values, None, labels
        ids = input_ids[0] if attention_mask is None else input_ids[0][attention_mask[0].bool()]
        embeds = torch.cat([self.image if i == -200 else torch.full_like(self.image[:1], float(i)) for i in ids])[None]
        n = embeds.shape[1]
        mask = None if attention_mask is None else torch.ones(1, n, dtype=torch.bool)
        return None, torch.arange(n)[None], mask, past_key_values, embeds, torch.arange(n)[None]


# vLLM


class QwenVl:
    """A model of vLLM: its processor has counted the placeholders before the video is encoded."""

    def __init__(self, compute_retention_mask, q: float):
        self.compute_retention_mask, self.q = compute_retention_mask, q

    def embed(self, video, thw, merge):
        frames, tokens = thw[0], (thw[1] // merge) * (thw[2] // merge)
        placeholders = max(tokens, int(tokens * frames * (1 - self.q)))
        mask = self.compute_retention_mask(video, thw, spatial_merge_size=merge, q=self.q)
        assert mask.dtype == torch.bool and mask.shape == video.shape[:1] and mask.sum() == placeholders
        return mask
