"""Triton's interpreter without what it computes again and again, or for nobody: docs/design/tests.md.

Results have the same bits, tests/test_quick_interpreter.py, and nothing that is checked is left out. Written against
Triton 3.9, whose lines are those of 3.6; newer versions run as they are.
"""

import dataclasses
import types

import triton.language as tl
from triton.language import core
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

VERSIONS = ("3.6.", "3.7.", "3.8.", "3.9.")


def once_a_key(begin, key):
    """A constructor that works once for each key, and sets the same attributes from then on."""
    known = {}

    def begin_once(self, *args):
        name = key(*args)
        if name not in known:
            begin(self, *args)
            known[name] = vars(self).copy()
        vars(self).update(known[name])

    return begin_once


def types_are_made_once() -> None:
    """A block's type by its element and sizes, and a tensor's sizes by its type."""

    def key(element, shape):
        return element.name, *(getattr(size, "value", size) for size in shape)

    core.block_type.__init__ = once_a_key(core.block_type.__init__, key)
    of_type = once_a_key(tl.tensor.__init__, lambda handle, type: type.name)

    def begin(self, handle, type):
        of_type(self, handle, type)
        self.handle, self.type = handle, type

    tl.tensor.__init__ = begin
    numpy_type, known = interpreter._get_np_dtype, {}

    def numpy_type_once(type):
        name = type.scalar.name
        if name not in known:
            known[name] = numpy_type(type)
        return known[name]

    interpreter._get_np_dtype = numpy_type_once


def language_is_replaced_once_a_launch() -> None:
    """Triton looks through all of triton.language again at each call of a jit function."""
    replace, everything = interpreter._patch_lang, types.SimpleNamespace(__globals__={"tl": tl, "core": core})

    def replace_once(function):
        return replace(everything) if core.is_builtin(tl.load) else interpreter._LangPatchScope()

    interpreter._patch_lang = replace_once


def equal_shapes_are_not_broadcast() -> None:
    broadcast = TritonSemantic.broadcast_impl_value

    def broadcast_where_needed(self, lhs, rhs):
        same = lhs.type.is_block() and rhs.type.is_block() and lhs.type.shape == rhs.type.shape
        return (lhs, rhs) if same else broadcast(self, lhs, rhs)

    TritonSemantic.broadcast_impl_value = broadcast_where_needed


def sums_are_not_repeated() -> None:
    """In 64 bits, for an assertion that is dropped where `debug` is not set."""
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=builder.options.debug)


def quicken() -> None:
    types_are_made_once()
    language_is_replaced_once_a_launch()
    equal_shapes_are_not_broadcast()
    sums_are_not_repeated()
