"""What type checkers and editors see: each parameter and each result of what is public has a type.

`make lint` holds the code to these types.
"""

import importlib.resources
import inspect
import types
import typing
from collections.abc import Iterator, Sequence

import pytest
import torch

import condense_kernels as ck
from condense_kernels import models, testing
from condense_kernels._dispatch.declaration import OPERATORS
from condense_kernels._dispatch.library import schema_of

PUBLIC = {name: value for name, value in vars(ck).items() if not name.startswith("_")}
PUBLIC |= {f"testing.{name}": getattr(testing, name) for name in testing.__all__}
PUBLIC |= {f"models.{name}": getattr(models, name) for name in ("apply_condense", "CondenseHandle", "Report")}


def functions_of(name: str, value: object) -> Iterator[tuple[str, types.FunctionType]]:
    """A function, or the methods and properties that a class has of its own."""
    if isinstance(value, property):
        value = value.fget
    elif isinstance(value, (classmethod, staticmethod)):
        value = value.__func__
    if isinstance(value, types.FunctionType):
        yield name, value
    if isinstance(value, type):
        for member, of_class in vars(value).items():
            if not member.startswith("_") or member == "__init__":
                yield from functions_of(f"{name}.{member}", of_class)


FUNCTIONS = dict(function for name, value in PUBLIC.items() for function in functions_of(name, value))


def test_the_functions_are_found():
    """Among them what is decorated, a method, a property, and what a dataclass makes."""
    assert FUNCTIONS.keys() >= {
        "condense",
        "debug",
        "Condense.forward",
        "testing.Finding.ok",
        "testing.Inputs.__init__",
    }


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_parameter_and_result_has_a_type(name):
    parameters = inspect.signature(FUNCTIONS[name]).parameters.keys() - {"self"}
    assert typing.get_type_hints(FUNCTIONS[name]).keys() == parameters | {"return"}


@pytest.mark.parametrize("name", [name for name, value in PUBLIC.items() if hasattr(value, "_fields")])
def test_every_field_of_a_named_tuple_has_a_type(name):
    assert list(typing.get_type_hints(PUBLIC[name])) == list(PUBLIC[name]._fields)


OF_SCHEMAS = {
    "Tensor": {torch.Tensor},
    "Optional[Tensor]": {torch.Tensor, types.NoneType},
    "Optional[List[int]]": {Sequence[int], types.NoneType},
    "int": {int},
    "float": {float},
    "Optional[float]": {float, types.NoneType},
    "bool": {bool},
    "str": {str},
}


@pytest.mark.parametrize("op", [op for op in OPERATORS if op in PUBLIC])
def test_the_types_hold_those_of_the_schema(op):
    """A function may take more: None, where it knows better itself."""
    hints = typing.get_type_hints(PUBLIC[op])
    for argument in schema_of(op).arguments:
        hint = hints[argument.name]
        accepted = set(typing.get_args(hint)) if isinstance(hint, types.UnionType) else {hint}
        assert accepted >= OF_SCHEMAS[str(argument.type)], argument.name


def test_type_checkers_are_told_that_there_are_types():
    assert (importlib.resources.files(ck) / "py.typed").is_file()
