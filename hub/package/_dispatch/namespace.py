"""Where torch knows the operators of this build, and which file brings them."""

from .._ops import add_op_namespace_prefix

NAMESPACE = add_op_namespace_prefix("").rstrip(":")
FILE = f"{NAMESPACE}.abi3.so"
