"""Rows and layouts: the order of flattening, and the refusal of unknown kinds."""

from dataclasses import fields

import pytest
import torch

from megadiff.diffusion import AttentionLayout, Rows


def test_flat_rows_are_sequence_major():
    batch_size, length = 3, 4
    numbers = torch.arange(batch_size * length).view(batch_size, length)
    names = [field.name for field in fields(Rows) if field.name != "any_uniform_mass"]
    rows = Rows(**{name: numbers + 100 * i for i, name in enumerate(names)}, any_uniform_mass=True)
    flat = rows.flat()
    assert flat.any_uniform_mass
    for i, name in enumerate(names):
        column = getattr(flat, name)
        assert column.shape == (batch_size * length,) and column.is_contiguous()
        for s in range(length):
            for b in range(batch_size):
                assert column[s * batch_size + b] == numbers[b, s] + 100 * i
    assert flat.flat() is flat


def test_unknown_layouts_are_refused():
    assert AttentionLayout().kind == "bidirectional" and AttentionLayout().is_plain
    with pytest.raises(ValueError, match=r"kind must be one of bidirectional, .*, got 'prefix'"):
        AttentionLayout("prefix")
