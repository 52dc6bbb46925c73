import torch


def attention_scores(q, k, *, rows=None, mask=None, scale=None, columns=None, **kw):
    if k.shape[1] != q.shape[1]:
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    s = (q.float() @ k.float().mT) * (scale or q.shape[-1] ** -0.5)
    if mask is not None:
        s = s.masked_fill(~mask[:, None, None], -torch.inf)
    p = s.softmax(-1)
    if rows is not None:
        ok = rows >= 0
        p = (p * ok[:, None, :, None]).sum(2) / ok.sum(-1)[:, None, None]
    else:
        p = p.mean(2)
    p = p.mean(1)
    return p[:, columns[0] : columns[1]] if columns else p
