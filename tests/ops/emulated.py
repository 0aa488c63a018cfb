"""The CUDA kernels' own source, compiled for the CPU by tests/csrc/cuda_emulator.h, behind the signatures of `ops`."""

from __future__ import annotations

import ctypes
import subprocess
import weakref
from ctypes import POINTER, c_bool, c_int, c_int64, c_void_p
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megadiff.ops import RowSums, RowTargets

ROOT = Path(__file__).parents[2]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Sums of products are contracted or not as the CPU has it; alignment traps, which the emulator turns into an error.
FLAGS = (
    "-std=c++17 -O1 -shared -fPIC -fno-strict-aliasing -ffp-contract=off -Wall -Wno-unknown-pragmas -U_FORTIFY_SOURCE"
)
TRAPS = "-fsanitize=alignment -fsanitize-undefined-trap-on-error"


def build(driver: str, folder: Path, *, csrc: Path = ROOT / "csrc", compiler: str = "g++") -> ctypes.CDLL:
    """Compile tests/csrc/`driver` with the emulator, and load it."""
    library, harness = folder / f"{driver}.so", ROOT / "tests" / "csrc"
    command = [compiler, *FLAGS.split(), *TRAPS.split(), f"-I{harness / 'stubs'}", f"-I{csrc}"]
    command += ["-isystem", str(Path(torch.__file__).parent / "include"), "-x", "c++"]
    command += ["-include", str(harness / "cuda_emulator.h"), str(harness / driver), "-o", str(library)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0 and not result.stderr, result.stderr
    loaded = ctypes.CDLL(str(library))
    loaded.guarded_new.restype = c_void_p
    loaded.guarded_new.argtypes = [c_int64, c_int64, c_bool, POINTER(c_void_p), POINTER(c_int64)]
    loaded.guarded_free.argtypes = loaded.guarded_forbid.argtypes = [c_void_p, c_int64]
    return loaded


_LIMITS = ("capability", "multiprocessors", "per_block", "per_multiprocessor", "code_capability")


class Device(ctypes.Structure):
    """The limits of the device that the emulator pretends to be."""

    _fields_ = [(name, c_int) for name in _LIMITS]


class Launch(ctypes.Structure):
    _fields_ = [("blocks", c_int64), ("threads", c_int), ("cluster", c_int), ("shared_bytes", c_int)]


class _Matrix(ctypes.Structure):
    _fields_ = [("data", c_void_p), ("rows", c_int64), ("columns", c_int64), ("stride", c_int64)]


class _Ids(ctypes.Structure):
    _fields_ = [("data", c_void_p), ("is_wide", c_bool)]


class _Targets(ctypes.Structure):
    _fields_ = [
        ("target", _Ids),
        ("noised", _Ids),
        *((name, c_void_p) for name in ("alpha", "uniform_mass", "kl_weight", "is_weight")),
    ]


class _Sums(ctypes.Structure):
    _fields_ = [(name, c_void_p) for name in RowSums._fields]


@dataclass
class Emulated:
    """The row-loss operators, on guarded copies of their arguments: whatever is touched beyond them is an error.

    There are `gap` elements between the rows of a matrix, and the first begins `lead` elements after a 16-byte boundary
    (a gradient that is not written in place `gradient_lead`). `at_end` puts guarded memory against the page after it,
    where without a lead it begins as it happens, else against the page before it.
    """

    library: ctypes.CDLL
    lead: int = 0
    gradient_lead: int = 0
    gap: int = 0
    at_end: bool = True

    def launched(self) -> Launch:
        launch = Launch()
        self.library.get_last_launch(ctypes.byref(launch))
        return launch

    def set_device(self, device: Device) -> None:
        self.library.set_device(ctypes.byref(device))

    def row_statistics(self, logits_TW: Tensor, target_T: Tensor, noised_T: Tensor, **columns: int) -> Tensor:
        logits, ids = self.matrix(logits_TW), [self.vector(ids) for ids in (target_T, noised_T)]
        statistics = self.vector(torch.full((4, logits_TW.shape[0]), torch.nan))
        self._call("row_statistics", logits, *(_ids(x) for x in ids), *_columns(columns), statistics)
        return statistics

    def row_partial_sums(self, logits_TW: Tensor, log_sum_exp_T: Tensor, targets: RowTargets, **columns: int) -> Tensor:
        logits, lse, numbers = self.matrix(logits_TW), self.vector(log_sum_exp_T), self._targets(targets)
        sums = self.vector(torch.full((2, logits_TW.shape[0]), torch.nan))
        self._call("row_partial_sums", logits, lse, numbers, *_columns(columns), sums)
        return sums

    def row_loss(self, sums: RowSums, targets: RowTargets, *, mask_id: int) -> Tensor:
        num_rows = targets.target.shape[0]
        all_sums, numbers = self._sums(sums), self._targets(targets)
        terms = self.vector(torch.full((3, num_rows), torch.nan))
        _check(self.library.row_loss, num_rows, all_sums, numbers, mask_id, terms)
        return terms

    def row_gradient(
        self, logits_TW: Tensor, sums: RowSums, targets: RowTargets, *, overwrite: bool = False, **columns: int
    ) -> Tensor:
        logits, all_sums, numbers = self.matrix(logits_TW), self._sums(sums), self._targets(targets)
        gradient = logits if overwrite else self.new_gradient(logits)
        self._call("row_gradient", logits, all_sums, numbers, *_columns(columns), _matrix(gradient))
        return self._intact(gradient)

    def whole_row_loss(self, logits_TV: Tensor, targets: RowTargets, *, vocab_size: int, mask_id: int) -> Tensor:
        return self.whole_row(self.matrix(logits_TV), None, targets, vocab_size, mask_id)

    def whole_row_gradient(
        self, logits_TV: Tensor, targets: RowTargets, *, vocab_size: int, mask_id: int, overwrite: bool = False
    ) -> tuple[Tensor, Tensor]:
        logits = self.matrix(logits_TV)
        gradient = logits if overwrite else self.new_gradient(logits)
        return self.whole_row(logits, gradient, targets, vocab_size, mask_id), self._intact(gradient)

    def scale_rows_(self, matrix_TW: Tensor, factor_T: Tensor) -> Tensor:
        matrix = self.matrix(matrix_TW)
        self.scale_rows(matrix, factor_T)
        return self._intact(matrix)

    def whole_row(
        self, logits: Tensor, gradient: Tensor | None, targets: RowTargets, vocab_size: int, mask_id: int
    ) -> Tensor:
        """On matrices that are guarded already."""
        numbers, terms = self._targets(targets), self.vector(torch.full((3, logits.shape[0]), torch.nan))
        out = _Matrix() if gradient is None else _matrix(gradient)
        self._call("whole_row", logits, numbers, vocab_size, mask_id, terms, out)
        return terms

    def scale_rows(self, matrix: Tensor, factor_T: Tensor) -> None:
        """On a matrix that is guarded already."""
        self._call("scale_rows", matrix, self.vector(factor_T))

    def vector(self, values: Tensor) -> Tensor:
        """A contiguous copy in guarded memory."""
        return self._copy(values, values.numel(), 0).view(values.shape).copy_(values)

    def matrix(self, values_TW: Tensor, lead: int | None = None) -> Tensor:
        """A copy in guarded memory with this object's layout, NaN between its rows."""
        rows, columns = values_TW.shape
        count = (columns + self.gap) * max(0, rows - 1) + columns
        storage = self._copy(values_TW, count, self.lead if lead is None else lead)
        return storage.as_strided((rows, columns), (columns + self.gap, 1), storage.storage_offset()).copy_(values_TW)

    def new_gradient(self, logits: Tensor) -> Tensor:
        return self.matrix(torch.full_like(logits, torch.nan), self.gradient_lead or self.lead)

    def forbid(self, values: Tensor) -> None:
        """From now on touching this copy is an error."""
        self.library.guarded_forbid(*_mappings[values.untyped_storage().data_ptr()])

    @property
    def _is_sparse(self) -> bool:
        """Rows so far apart that most of the memory between them is never touched, by the tests neither."""
        return self.gap > 1 << 28

    def _copy(self, like: Tensor, count: int, lead: int) -> Tensor:
        size, alignment = (count + lead) * like.element_size(), 16 if lead or not self.at_end else like.element_size()
        mapping, mapped = c_void_p(), c_int64()
        place = self.library.guarded_new(size, alignment, self.at_end, ctypes.byref(mapping), ctypes.byref(mapped))
        memory = (ctypes.c_uint8 * max(1, size)).from_address(place)
        _mappings[place] = (mapping, mapped)
        weakref.finalize(memory, self.library.guarded_free, mapping, mapped)
        if count == 0:
            return like.new_empty(0)
        values = torch.frombuffer(memory, dtype=like.dtype, count=count + lead)
        if not self._is_sparse:
            values.fill_(torch.nan if like.is_floating_point() else -1)
        return values[lead:]

    def _intact(self, matrix: Tensor) -> Tensor:
        """The matrix, when nothing was written before it and between its rows."""
        if self._is_sparse:
            return matrix
        storage = torch.empty(0, dtype=matrix.dtype).set_(matrix.untyped_storage())
        outside = torch.ones_like(storage, dtype=torch.bool)
        outside.as_strided(matrix.shape, matrix.stride(), matrix.storage_offset()).fill_(False)
        assert storage[outside].isnan().all(), "written outside the matrix"
        return matrix

    def _targets(self, targets: RowTargets) -> _Targets:
        copies = [self.vector(ids) for ids in targets[:2]] + [self.vector(field.float()) for field in targets[2:]]
        numbers = _Targets(_ids(copies[0]), _ids(copies[1]), *(field.data_ptr() for field in copies[2:]))
        numbers.kept_alive = copies
        return numbers

    def _sums(self, sums: RowSums) -> _Sums:
        copies = [self.vector(field) for field in sums]
        all_sums = _Sums(*(field.data_ptr() for field in copies))
        all_sums.kept_alive = copies
        return all_sums

    def _call(self, name: str, matrix: Tensor, *arguments: Any) -> None:
        _check(getattr(self.library, name), DTYPES.index(matrix.dtype), _matrix(matrix), *arguments)


_mappings: dict[int, tuple[c_void_p, c_int64]] = {}


def _check(function: Any, *arguments: Any) -> None:
    function.restype = ctypes.c_char_p
    if error := function(*map(_as_c, arguments)):
        raise RuntimeError(error.decode())


def _as_c(argument: Any) -> Any:
    if isinstance(argument, Tensor):
        return c_void_p(argument.data_ptr())
    return ctypes.byref(argument) if isinstance(argument, ctypes.Structure) else c_int64(argument)


def _columns(columns: dict[str, int]) -> list[int]:
    return [columns[name] for name in ("vocab_start", "vocab_size", "mask_id")]


def _ids(ids: Tensor) -> _Ids:
    return _Ids(ids.data_ptr(), ids.dtype == torch.int64)


def _matrix(matrix: Tensor) -> _Matrix:
    return _Matrix(matrix.data_ptr(), *matrix.shape, matrix.stride(0))
