"""The operators of this build, in a namespace that no other build has. kernel-builder writes such a file, too."""

import torch

NAMESPACE = "@ID@"
ops = getattr(torch.ops, NAMESPACE)


def add_op_namespace_prefix(op_name: str) -> str:
    return f"{NAMESPACE}::{op_name}"
