"""CondenseVLM written plainly in torch, the way a method's own repository would: the baselines to beat."""

import torch
import torch.nn.functional as F


def greedy_as_printed(s, utility, picks, taken):  # [N, N], [N]
    """Eq. 2 and 4 to the letter: the maximum over all picks so far, anew at every step."""
    order = []
    for _ in range(picks):
        score = utility if not order else utility - s[:, order].amax(dim=1)
        pick = score.masked_fill(taken, -torch.inf).argmax()
        taken[pick] = True
        order.append(pick)
    return torch.stack(order) if order else utility.new_empty(0, dtype=torch.int64)


def greedy_running_maximum(s, utility, picks, taken):  # [N, N], [N]
    """The same picks from a running maximum: what a careful author would write."""
    order, suppressor = [], None
    for _ in range(picks):
        score = utility if suppressor is None else utility - suppressor
        pick = score.masked_fill(taken, -torch.inf).argmax()
        taken[pick] = True
        order.append(pick)
        suppressor = s[pick] if suppressor is None else torch.maximum(suppressor, s[pick])
    return torch.stack(order) if order else utility.new_empty(0, dtype=torch.int64)


def select_and_merge(features, scores, num_anchors, num_background, grid, loop=greedy_running_maximum):
    """features [B, N, D] fp32, scores [B, N]; suppression and spatial weight 1."""
    y, x = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    at = torch.stack([y.flatten(), x.flatten()], dim=-1).float().to(features.device)
    distance = torch.cdist(at, at)
    distance = distance / distance.max()
    results = []
    for tokens, score in zip(features, scores, strict=True):
        z = F.normalize(tokens, dim=-1)
        s = z @ z.T
        sbar, g = s.abs().mean(), s.sum(dim=1)
        taken = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
        anchors = loop(s, sbar / score.abs().mean() * score, num_anchors, taken)
        background = loop(s, sbar / g.abs().mean() * g, num_background, taken)
        indices = torch.cat([anchors, background]).sort().values
        assignment = (s[:, indices] - distance[:, indices]).argmax(dim=1)
        assignment[indices] = torch.arange(len(indices), device=tokens.device)
        weights = torch.zeros(len(indices), len(tokens), device=tokens.device)
        weights[assignment, torch.arange(len(tokens), device=tokens.device)] = score
        mass = weights.sum(dim=1)
        results.append((weights @ tokens / mass[:, None], indices, assignment, mass))
    return tuple(torch.stack(parts) for parts in zip(*results, strict=True))
