"""Flags of the command line from configuration classes, and back: a field's docstring is its help."""

from __future__ import annotations

import argparse
import dataclasses
import typing
from typing import Any

from megadiff import fields


def add_fields(parser: argparse.ArgumentParser, cls: type) -> None:
    """One flag per field of a configuration class, with its docstring as help."""
    docs, hints = fields.field_docs(cls), typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        is_tuple = typing.get_origin(hints[field.name]) is tuple
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        options: dict[str, Any] = {"nargs": "*"} if is_tuple else {}
        default = "" if required or field.default in (None, "", ()) else f" (default: {field.default})"
        parser.add_argument(
            f"--{fields.flag(field.name)}",
            required=required,
            default=argparse.SUPPRESS,
            metavar=field.name.rpartition("_")[2].upper(),
            help=docs.get(field.name, "").replace("%", "%%") + default,
            **options,
        )


def from_arguments(cls: type, arguments: argparse.Namespace) -> Any:
    """Build a configuration class from the flags of `add_fields`."""
    hints = typing.get_type_hints(cls)
    values = {}
    for field in dataclasses.fields(cls):
        if field.name not in arguments:
            continue
        given = getattr(arguments, field.name)
        name = f"--{fields.flag(field.name)}"
        values[field.name] = (
            tuple(given) if isinstance(given, list) else fields.parse_value(name, given, hints[field.name])
        )
    return cls(**values)
