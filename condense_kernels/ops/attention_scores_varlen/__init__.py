import torch

from ..attention_scores import attention_scores


def attention_scores_varlen(q, k, cu, m, *, scale=None):
    c = cu.tolist()
    return torch.cat(
        [
            attention_scores(q[a:b].transpose(0, 1)[None], k[a:b].transpose(0, 1)[None], scale=scale)[0]
            for a, b in zip(c, c[1:])
        ]
    )
