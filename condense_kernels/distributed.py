"""The operators on DTensors: importing this module puts their rules in (docs/distributed.md)."""

from ._dispatch import dtensor as _dtensor  # noqa: F401
