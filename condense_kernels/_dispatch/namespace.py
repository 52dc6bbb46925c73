"""Where torch knows the operators, and which file brings them. A build for a kernel hub has its own: docs/hub.md."""

NAMESPACE = "condense"  # torch.ops.condense; in C++ the same word
FILE = "_C.abi3.so"
