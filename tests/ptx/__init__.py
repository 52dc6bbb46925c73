"""Runs compiled Triton kernels without a GPU: PTX, executed and checked on the CPU."""
