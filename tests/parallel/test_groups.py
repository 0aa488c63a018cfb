"""Layouts that do not fit are refused before any process group exists."""

from __future__ import annotations

import pytest

from megadiff.parallel.groups import ParallelConfig


def test_data_parallel_size_is_what_the_world_leaves_over() -> None:
    config = ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=3)
    assert config.data_parallel_size(12) == 2


def test_refuses_worlds_and_sizes_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"3 process.*start a multiple of 2 processes"):
        ParallelConfig(tensor_model_parallel_size=2).data_parallel_size(3)
    with pytest.raises(ValueError, match=r"parallel.pipeline_model_parallel_size is 0"):
        ParallelConfig(pipeline_model_parallel_size=0)
