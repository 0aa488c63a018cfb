"""Settings as frozen dataclasses: their help texts, their command-line spelling, their YAML.

A field's docstring is its help text, its annotation is its parser, its name is its flag. So a setting is written
once, beside the class it configures, and no list of options exists anywhere else.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import math
import re
import textwrap
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, TypeVar, Union

T = TypeVar("T")

Seconds = Annotated[float, "seconds"]
"""Annotation of a setting that is a duration: a number of seconds, on the command line also 3h50m, 45m or 1m30s."""

_DURATION = re.compile("".join(rf"(?:(?P<{unit}>\d+(?:\.\d+)?){unit})?" for unit in "dhms"))
_SECONDS_OF = {"d": 86400, "h": 3600, "m": 60, "s": 1}

_TRUE, _FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


def require(condition: bool, name: str, value: Any, expected: str) -> None:
    """Refuse a setting in the one sentence that all settings share.

    Raises:
        ValueError: `condition` is false; the sentence reads "NAME is VALUE, but must EXPECTED".
    """
    if not condition:
        raise ValueError(f"{name} is {value}, but must {expected}")


def require_choices(config: Any, section: str) -> None:
    """Refuse values of a dataclass that its Literal annotations do not have: recipes and YAML pass no parser.

    Raises:
        ValueError: a field has none of its choices.
    """
    for name, hint in typing.get_type_hints(type(config)).items():
        if typing.get_origin(hint) is Literal:
            choices, value = typing.get_args(hint), getattr(config, name)
            require(value in choices, f"{section}.{name}", repr(value), f"be one of {', '.join(map(str, choices))}")


def field_docs(cls: type) -> dict[str, str]:
    """The string literal below each field of a dataclass or of its bases, in one line each."""
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    assert isinstance(body, ast.ClassDef)
    docs = {
        name: doc
        for base in reversed(cls.__bases__)
        if dataclasses.is_dataclass(base)
        for name, doc in field_docs(base).items()
    }
    for statement, following in zip(body.body, [*body.body[1:], None], strict=True):
        if (
            isinstance(statement, ast.AnnAssign)
            and isinstance(statement.target, ast.Name)
            and isinstance(following, ast.Expr)
            and isinstance(following.value, ast.Constant)
        ):
            docs[statement.target.id] = " ".join(str(following.value.value).split())
    return docs


def parse_value(name: str, text: str, annotation: Any) -> Any:
    """Read a command-line value as the type that a field is annotated with.

    Understands int, float, str, bool, Literal, tuples of these (comma-separated), Path, Seconds and `X | None` (none).

    Raises:
        ValueError: the text is not such a value.
    """
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (Union, types.UnionType):
        if text.lower() in ("none", "null"):
            return None
        (annotation,) = (a for a in arguments if a is not type(None))
        return parse_value(name, text, annotation)
    if origin is Literal:
        if text not in arguments:
            raise ValueError(f"{name} is {text!r}, but must be one of {', '.join(map(str, arguments))}")
        return text
    if origin is tuple:
        parts = [part for part in text.split(",") if part]
        types_of_parts = arguments[:1] * len(parts) if arguments[-1] is Ellipsis else arguments
        if len(parts) != len(types_of_parts):
            raise ValueError(f"{name} is {text!r}, but must be {len(types_of_parts)} values with commas between them")
        return tuple(parse_value(name, part, one) for part, one in zip(parts, types_of_parts, strict=True))
    if annotation is bool:
        if text.lower() not in _TRUE + _FALSE:
            raise ValueError(f"{name} is {text!r}, but must be true or false")
        return text.lower() in _TRUE
    if annotation == Seconds:
        return _parse_seconds(name, text)
    try:
        return annotation(text)
    except ValueError:
        raise ValueError(f"{name} is {text!r}, but must be {_article(annotation.__name__)}") from None


def _parse_seconds(name: str, text: str) -> float:
    if (match := _DURATION.fullmatch(text)) and text:
        return sum(float(count) * _SECONDS_OF[unit] for unit, count in match.groupdict("0").items())
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not math.isfinite(seconds):
        raise ValueError(f"{name} is {text!r}, but must be a duration such as 3h50m, 45m, 90s, or a number of seconds")
    return seconds


def _article(type_name: str) -> str:
    return {"int": "an integer", "float": "a number"}.get(type_name, f"a {type_name}")


def unknown_name(kind: str, name: str, known: Iterable[str]) -> ValueError:
    """The error for a name that does not exist, with the nearest one that does."""
    nearest = difflib.get_close_matches(name, list(known), n=1, cutoff=0.4)
    remedy = f"did you mean {nearest[0]}?" if nearest else f"known: {', '.join(sorted(known))}"
    return ValueError(f"unknown {kind} {name}: {remedy}")


def from_mapping(cls: type[T], mapping: Mapping[str, Any], where: str) -> T:
    """Build a dataclass from plain data, nested dataclasses included, refusing names it does not have.

    Raises:
        ValueError: an unknown name, or a value the class refuses.
    """
    hints = typing.get_type_hints(cls)
    values = {}
    for name, value in mapping.items():
        if name not in hints:
            raise unknown_name(f"setting in {where}", name, hints)
        if dataclasses.is_dataclass(hints[name]):
            value = from_mapping(typing.cast(type, hints[name]), value, f"{where}.{name}")
        elif isinstance(value, list):
            value = tuple(value)
        values[name] = value
    return cls(**values)


def flag(name: str) -> str:
    """Command-line spelling of a field: dashes for underscores."""
    return name.replace("_", "-")


def parse_flags(arguments: list[str]) -> dict[str, str]:
    """Split `--name value` and `--name=value` into names (underscored) and texts.

    Raises:
        ValueError: an argument without a name, or a name without a value.
    """
    values: dict[str, str] = {}
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("--"):
            raise ValueError(f"unexpected argument {argument!r}: settings are given as --section.field value")
        name, separator, text = argument[2:].partition("=")
        if not separator:
            if not rest or (rest[0].startswith("--") and len(rest[0]) > 2):
                raise ValueError(f"--{name} has no value: give one as --{name} VALUE")
            text = rest.pop(0)
        values[name.replace("-", "_")] = text
    return values


def _field_names(config: Any) -> list[str]:
    """Dotted names of the settable fields: `section.field` for nested dataclasses, else `field`."""
    names = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        inner = [f".{name}" for name in _field_names(value)] if dataclasses.is_dataclass(value) else [""]
        names += [field.name + name for name in inner]
    return names


def override(config: T, values: Mapping[str, str]) -> T:
    """Replace fields by command-line texts: `field` of the class, or `section.field` of a nested one.

    Raises:
        ValueError: an unknown name (with the nearest known one) or an unreadable value.
    """
    known = _field_names(config)
    changes: dict[str, dict[str, Any]] = {}
    for name, text in values.items():
        if name not in known:
            raise unknown_name("option", f"--{flag(name)}", [f"--{flag(k)}" for k in known])
        section, _, field = name.rpartition(".")
        owner = type(getattr(config, section)) if section else type(config)
        value = parse_value(f"--{flag(name)}", text, typing.get_type_hints(owner, include_extras=True)[field])
        changes.setdefault(section, {})[field] = value
    replaced = {
        section: dataclasses.replace(getattr(config, section), **fields)
        for section, fields in changes.items()
        if section
    }
    return dataclasses.replace(config, **replaced, **changes.get("", {}))  # type: ignore[type-var]


def describe(config: Any, prefix: str = "") -> str:
    """Help text of every field: flag, default and docstring; nested dataclasses as sections."""
    docs = field_docs(type(config))
    lines = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            lines += ["", f"{field.name}: {' '.join((type(value).__doc__ or '').split())}"]
            lines.append(describe(value, prefix=f"{field.name}."))
        else:
            text = ",".join(map(str, value)) if isinstance(value, tuple) else value
            lines.append(f"  --{flag(prefix + field.name)} {text if text != '' else repr('')}")
            lines += textwrap.wrap(docs.get(field.name, ""), 92, initial_indent=" " * 8, subsequent_indent=" " * 8)
    return "\n".join(lines)
