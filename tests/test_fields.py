"""Settings: parsed by annotation, explained by docstring, refused with the nearest name."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from megadiff import fields


@dataclass(frozen=True, kw_only=True)
class Inner:
    """An inner section."""

    rate: float = 0.5
    """How fast,
    in Hertz."""
    kind: Literal["a", "b"] = "a"
    limit: int | None = None
    pause: fields.Seconds | None = None


@dataclass(frozen=True, kw_only=True)
class Outer:
    """All of it."""

    inner: Inner = field(default_factory=Inner)
    on_time: bool = False
    """Whether it is on time."""
    names: tuple[str, ...] = ()
    path: Path = Path(".")


def test_overrides_reach_nested_fields_by_type() -> None:
    flags = ["--inner.rate", "2", "--on-time=yes", "--inner.limit", "7", "--names", "x,y", "--path", "/tmp"]
    changed = fields.override(Outer(), fields.parse_flags(flags))
    assert changed == Outer(inner=Inner(rate=2.0, limit=7), on_time=True, names=("x", "y"), path=Path("/tmp"))
    assert fields.override(changed, {"inner.limit": "none"}).inner.limit is None
    assert fields.override(Outer(), {"inner.rate": "-1e-3"}).inner.rate == -1e-3


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("3h50m", 13800.0), ("45m", 2700.0), ("90s", 90.0), ("1d2h0.5m1s", 93631.0), ("1.5h", 5400.0), ("7.5", 7.5)],
)
def test_durations_are_read_as_people_write_them(text: str, seconds: float) -> None:
    pause = fields.override(Outer(), {"inner.pause": text}).inner.pause
    assert pause == seconds and type(pause) is float, "plain, for YAML"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--inner.rates", "2"], r"unknown option --inner.rates: did you mean --inner.rate\?"),
        (["--ontime", "yes"], r"unknown option --ontime: did you mean --on-time\?"),
        (["--inner.rate", "fast"], "--inner.rate is 'fast', but must be a number"),
        (["--inner.limit", "1.5"], "--inner.limit is '1.5', but must be an integer"),
        (["--inner.kind", "c"], "--inner.kind is 'c', but must be one of a, b"),
        (["--on-time", "perhaps"], "--on-time is 'perhaps', but must be true or false"),
        *(
            (["--inner.pause", text], "--inner.pause is '.*', but must be a duration such as 3h50m, 45m, 90s, or")
            for text in ("soon", "50m3h", "", "3h50", "inf")
        ),
        (["--on-time"], "--on-time has no value"),
        (["--on-time", "--path", "x"], "--on-time has no value"),
        (["stray"], "unexpected argument 'stray'"),
        (["--inner", "3"], "unknown option --inner"),
    ],
)
def test_refuses_with_one_helpful_sentence(flags: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fields.override(Outer(), fields.parse_flags(flags))


def test_plain_data_round_trip_and_unknown_names() -> None:
    config = Outer(inner=Inner(limit=3), names=("x",))
    data = dataclasses.asdict(config) | {"names": ["x"]}
    assert fields.from_mapping(Outer, data, "file") == config
    with pytest.raises(ValueError, match=r"unknown setting in file.inner ratee: did you mean rate\?"):
        fields.from_mapping(Outer, {"inner": {"ratee": 1}}, "file")


def test_help_shows_flag_default_and_docstring() -> None:
    text = fields.describe(Outer())
    assert "inner: An inner section." in text
    assert "  --inner.rate 0.5\n        How fast, in Hertz." in text
    assert "--on-time False\n        Whether it is on time." in text
