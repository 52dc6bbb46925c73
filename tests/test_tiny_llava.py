"""The tiny LLaVA: its pictures and questions, its packed answers against transformers' own, and its table."""

import numpy as np
import pytest
import torch

from condense_kernels.models import apply_condense
from condense_kernels.tiny_llava import answers, questions, scenes
from condense_kernels.tiny_llava.model import PATCHES, PROMPT, answer, encode, processor, to_input, tokens_of, untrained
