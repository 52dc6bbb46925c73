"""Run by `make vllm`, in an environment of its own: checkpoints with random weights, as the hub has them."""

import os
import tempfile

os.environ.update(  # before vLLM is imported
    HF_HUB_OFFLINE="1",
    VLLM_CACHE_ROOT=tempfile.mkdtemp(prefix="vllm-"),
    VLLM_CPU_KVCACHE_SPACE="1",  # GiB
    VLLM_CPU_OMP_THREADS_BIND="nobind",  # else two ranks need two nodes of memory
    VLLM_ENABLE_V1_MULTIPROCESSING="0",  # but for the tests that ask for it
    VLLM_LOGGING_LEVEL="WARNING",
    VLLM_NO_USAGE_STATS="1",
)

import checkpoints
import pytest


@pytest.fixture(scope="session")
def llava(tmp_path_factory):
    return checkpoints.llava(tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="session")
def llava_siglip(tmp_path_factory):
    return checkpoints.llava_siglip(tmp_path_factory.mktemp("llava_siglip"))


@pytest.fixture(scope="session")
def llava_next(tmp_path_factory):
    return checkpoints.llava_next(tmp_path_factory.mktemp("llava_next"))
