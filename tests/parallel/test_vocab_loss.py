"""The row loss against the dense reference: value, gradient, what it keeps, edges. On ranks: test_head_loss.py."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from megadiff.diffusion import (
    DiffusionProcess,
    HybridMixing,
    MaskedMixing,
    NoiseSchedule,
    Rows,
    UniformMixing,
    nelbo_terms,
)
from megadiff.ops import (
    RowSums,
    RowTargets,
    merge_statistics,
    row_gradient,
    row_loss,
    row_partial_sums,
    row_statistics,
    scale_rows_,
)
from megadiff.parallel.vocab_loss import vocab_loss

V, MASK, PADDED = 37, 3, 48
MIXINGS = {
    "masked": MaskedMixing(V, MASK),
    "hybrid": HybridMixing(V, MASK, 0.0),
    "hybrid -1000": HybridMixing(V, MASK, -1000.0),
    "uniform": UniformMixing(V, MASK),
    "uniform with mask": UniformMixing(V, MASK, include_mask=True),
}


def make_rows(process: DiffusionProcess, num_rows: int, *, weights: bool = True) -> tuple[Rows, torch.Tensor]:
    """Rows that the process can produce, a third each kept, masked and replaced, over the whole log-SNR range."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(4, V, (num_rows,), generator=generator)
    noise = torch.randint(4, V, (num_rows,), generator=generator)
    kind = torch.arange(num_rows) % 3
    noised = torch.where(kind == 0, tokens, torch.where(kind == 1, noise, MASK))
    log_snr = torch.linspace(-9, 9, num_rows, dtype=torch.float64)
    possible = process.marginal_at(log_snr, tokens, noised) > 0
    noised = torch.where(possible, noised, tokens)
    weight = process.loss_weight(log_snr, tokens, noised)
    rows = Rows(
        target=tokens,
        noised=noised,
        alpha=process.alpha(log_snr),
        uniform_mass=process.uniform_mass(log_snr),
        kl_weight=weight if weights else torch.ones_like(weight),
        is_weight=weight if weights else torch.ones_like(weight),
        elbo_weight=process.elbo_weight(log_snr, tokens, noised),
        counted=torch.ones(num_rows, dtype=torch.bool),
        any_uniform_mass=process.any_uniform_mass,
    )
    return rows, log_snr


@pytest.mark.parametrize("name", MIXINGS)
def test_equals_dense_reference_in_value_and_gradient(name: str) -> None:
    process = DiffusionProcess(NoiseSchedule(), MIXINGS[name])
    rows, log_snr = make_rows(process, 60)
    logits = (
        3 * torch.randn(60, PADDED, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ).requires_grad_()

    loss, kl_div, is_div = vocab_loss(logits, rows, vocab_size=V, mask_id=MASK)
    (gradient,) = torch.autograd.grad(loss.sum(), logits)

    reference = nelbo_terms(logits[:, :V], rows.target, rows.noised, log_snr, process)
    active = reference.loss_weight != 0
    weighted = torch.where(active, reference.loss_weight * (reference.kl_div + reference.is_div), 0.0)
    (expected,) = torch.autograd.grad(weighted.sum(), logits)

    torch.testing.assert_close(loss, weighted, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(kl_div[active], reference.kl_div[active], rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(is_div[active], reference.is_div[active], rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(gradient, expected, rtol=1e-8, atol=1e-10)
    assert gradient[:, V:].abs().max() == 0 and gradient[:, MASK].abs().max() == 0


def test_cross_entropy_is_a_value_of_the_row_numbers() -> None:
    logits = torch.randn(5, PADDED, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([0, 5, 7, 36, 4])
    one, zero = torch.ones(5, dtype=torch.float64), torch.zeros(5, dtype=torch.float64)
    rows = Rows(
        target=target,
        noised=torch.full((5,), MASK),
        alpha=one,
        uniform_mass=zero,
        kl_weight=one,
        is_weight=zero,
        elbo_weight=one,
        counted=torch.ones(5, dtype=torch.bool),
        any_uniform_mass=False,
    )
    loss = vocab_loss(logits, rows, vocab_size=V, mask_id=MASK).loss_T
    without_mask = logits[:, :V].clone()
    without_mask[:, MASK] = -torch.inf
    expected = torch.nn.functional.cross_entropy(without_mask, target, reduction="none")
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(
        torch.autograd.grad(loss.sum(), logits)[0], torch.autograd.grad(expected.sum(), logits)[0]
    )


@pytest.mark.parametrize("shards", [(48,), (16, 32), (16, 16, 16), (4, 40, 4)])
def test_any_split_of_the_vocabulary_gives_the_same_loss_and_gradient(shards: tuple[int, ...]) -> None:
    """What tensor-parallel ranks compute, one after another; the last split has a shard of padding alone."""
    process = DiffusionProcess(NoiseSchedule(), MIXINGS["hybrid"])
    rows, _ = make_rows(process, 33)
    targets = RowTargets(rows.target, rows.noised, rows.alpha, rows.uniform_mass, rows.kl_weight, rows.is_weight)
    logits = torch.randn(
        33, PADDED, dtype=torch.float64, generator=torch.Generator().manual_seed(2), requires_grad=True
    )
    loss = vocab_loss(logits, rows, vocab_size=V, mask_id=MASK).loss_T
    grad_loss = torch.linspace(-1, 2, 33, dtype=torch.float64)
    (expected,) = torch.autograd.grad(loss, logits, grad_loss)

    pieces = logits.detach().split(shards, dim=1)
    starts = [sum(shards[:i]) for i in range(len(shards))]
    columns = [{"vocab_start": start, "vocab_size": V, "mask_id": MASK} for start in starts]
    statistics = [
        row_statistics(piece, rows.target, rows.noised, **c) for piece, c in zip(pieces, columns, strict=True)
    ]
    log_sum_exp, target_logit, noised_logit = merge_statistics(torch.stack(statistics))
    partial = sum(row_partial_sums(p, log_sum_exp, targets, **c) for p, c in zip(pieces, columns, strict=True))
    sums = RowSums(log_sum_exp, target_logit, noised_logit, *partial)
    torch.testing.assert_close(row_loss(sums, targets, mask_id=MASK)[0], loss, rtol=1e-12, atol=1e-12)
    gradient = torch.cat([row_gradient(p, sums, targets, **c) for p, c in zip(pieces, columns, strict=True)], dim=1)
    torch.testing.assert_close(scale_rows_(gradient, grad_loss), expected, rtol=1e-12, atol=1e-12)


PRECISIONS = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])  # eager, native, native


def logits_and_rows(dtype: torch.dtype) -> tuple[torch.Tensor, Rows]:
    rows, _ = make_rows(DiffusionProcess(NoiseSchedule(), MIXINGS["hybrid"]), 30)
    return torch.randn(30, PADDED, generator=torch.Generator().manual_seed(4)).to(dtype).requires_grad_(), rows


@PRECISIONS
def test_gradient_takes_the_place_of_the_logits_where_asked(dtype: torch.dtype) -> None:
    leaf, rows = logits_and_rows(dtype)
    grad_loss = torch.linspace(-1, 2, 30, dtype=torch.float64)
    gradients = {}
    for overwrite in (False, True):
        logits = leaf * 1
        before, at = logits.detach().clone(), logits.data_ptr()
        loss = vocab_loss(logits, rows, vocab_size=V, mask_id=MASK, overwrite_logits=overwrite).loss_T
        assert torch.equal(logits, before) != overwrite
        received = []
        logits.register_hook(received.append)
        (gradients[overwrite],) = torch.autograd.grad(loss, leaf, grad_loss.to(loss.dtype))
        assert (received[0].data_ptr() == at) == overwrite
    assert torch.equal(gradients[False], gradients[True])
    with torch.no_grad():  # no gradient is wanted, so nothing replaces the logits
        vocab_loss(logits := leaf * 1, rows, vocab_size=V, mask_id=MASK, overwrite_logits=True)
        assert torch.equal(logits, leaf)


@PRECISIONS
def test_autograd_refuses_logits_that_others_needed(dtype: torch.dtype) -> None:
    leaf, rows = logits_and_rows(dtype)
    squashed = leaf.tanh()  # whose derivative is a function of its value
    vocab_loss(squashed, rows, vocab_size=V, mask_id=MASK).loss_T.sum().backward()
    loss = vocab_loss(leaf.tanh(), rows, vocab_size=V, mask_id=MASK, overwrite_logits=True).loss_T
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.sum().backward()


@PRECISIONS
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_second_backward_is_refused(dtype: torch.dtype, overwrite: bool) -> None:
    leaf, rows = logits_and_rows(dtype)
    loss = vocab_loss(leaf * 1, rows, vocab_size=V, mask_id=MASK, overwrite_logits=overwrite).loss_T.sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_keeps_the_gradient_and_nothing_else() -> None:
    leaf, rows = logits_and_rows(torch.float32)
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = vocab_loss(leaf, rows, vocab_size=V, mask_id=MASK).loss_T
        vocab_loss(leaf.detach(), rows, vocab_size=V, mask_id=MASK)
        with torch.no_grad():
            assert not vocab_loss(leaf, rows, vocab_size=V, mask_id=MASK).loss_T.requires_grad
    assert [tensor.shape for tensor in kept] == [leaf.shape]
    assert torch.equal(torch.autograd.grad(loss.sum(), leaf)[0], kept[0])


def test_rows_of_zero_weight_are_silent_even_with_broken_logits() -> None:
    process = DiffusionProcess(NoiseSchedule(), MIXINGS["hybrid"])
    rows, _ = make_rows(process, 6)
    silent = torch.tensor([True, False] * 3)
    weight = torch.where(silent, 0.0, rows.kl_weight)
    rows = Rows(**{**vars(rows), "kl_weight": weight, "is_weight": weight})
    logits = torch.randn(6, PADDED)
    logits[silent] = torch.nan
    logits.requires_grad_()
    loss, kl_div, is_div = vocab_loss(logits, rows, vocab_size=V, mask_id=MASK)
    loss.sum().backward()
    for value in (loss, kl_div, is_div):
        assert (value[silent] == 0).all() and value[~silent].isfinite().all()
    assert logits.grad is not None and (logits.grad[silent] == 0).all() and (logits.grad[~silent] != 0).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("vocab_size", "num_rows"), [(1271, 61), (1271, 1), (V, 90)])
def test_low_precision_error_is_within_twice_that_of_rounded_logits(
    dtype: torch.dtype, vocab_size: int, num_rows: int
) -> None:
    """Value and gradient, against fp64 on exact logits; the budget is the fp64 error of the rounded logits."""
    process = DiffusionProcess(NoiseSchedule(), HybridMixing(vocab_size, MASK, 0.0))
    rows, log_snr = make_rows(process, num_rows)
    logits = 2 * torch.randn(num_rows, vocab_size, dtype=torch.float64, generator=torch.Generator().manual_seed(3))

    def reference(logits: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = logits.double().requires_grad_()
        terms = nelbo_terms(logits, rows.target, rows.noised, log_snr, process)
        loss = terms.loss_weight * (terms.kl_div + terms.is_div)
        return {
            "loss": loss.detach(),
            "kl": terms.kl_div.detach(),
            "is": terms.is_div.detach(),
            "gradient": torch.autograd.grad(loss.sum(), logits)[0],
        }

    rounded = logits.to(dtype).requires_grad_()
    in_fp32 = Rows(
        **{k: v.float() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in vars(rows).items()}
    )
    loss, kl_div, is_div = vocab_loss(rounded, in_fp32, vocab_size=vocab_size, mask_id=MASK)
    ours = {"loss": loss, "kl": kl_div, "is": is_div, "gradient": torch.autograd.grad(loss.sum(), rounded)[0]}
    assert loss.dtype == torch.float32 and ours["gradient"].dtype == dtype

    exact, best = reference(logits), reference(rounded.detach())
    rounding = torch.finfo(dtype if dtype == torch.bfloat16 else torch.float32).eps
    for name, value in ours.items():
        scale = exact[name].abs().max()
        budget = 2 * (best[name] - exact[name]).abs().max() + 4 * rounding * scale
        assert (value - exact[name]).abs().max() <= budget, name


def test_no_rows_and_batched_rows() -> None:
    process = DiffusionProcess(NoiseSchedule(), MIXINGS["hybrid"])
    rows, _ = make_rows(process, 12)
    logits_T = torch.randn(12, PADDED)
    batched = Rows(**{k: v.view(4, 3).t() if isinstance(v, torch.Tensor) else v for k, v in vars(rows).items()})
    torch.testing.assert_close(
        vocab_loss(logits_T, batched, vocab_size=V, mask_id=MASK).loss_T,
        vocab_loss(logits_T, rows, vocab_size=V, mask_id=MASK).loss_T,
    )
    shared = Rows(**{**vars(rows), "alpha": rows.alpha[:1].expand(12)})  # one number for a whole sequence
    written_out = Rows(**{**vars(rows), "alpha": rows.alpha[:1].repeat(12)})
    assert torch.equal(
        vocab_loss(logits_T, shared, vocab_size=V, mask_id=MASK).loss_T,
        vocab_loss(logits_T, written_out, vocab_size=V, mask_id=MASK).loss_T,
    )
    empty = Rows(**{k: v[:0] if isinstance(v, torch.Tensor) else v for k, v in vars(rows).items()})
    assert vocab_loss(torch.randn(0, PADDED), empty, vocab_size=V, mask_id=MASK).loss_T.shape == (0,)


def test_refuses_rows_and_shards_that_do_not_fit() -> None:
    rows, _ = make_rows(DiffusionProcess(NoiseSchedule(), MIXINGS["hybrid"]), 6)
    with pytest.raises(ValueError, match="6 tokens but the logits have 5 rows"):
        vocab_loss(torch.randn(5, PADDED), rows, vocab_size=V, mask_id=MASK)
    with pytest.raises(ValueError, match="hold only 20"):
        vocab_loss(torch.randn(6, 20), rows, vocab_size=V, mask_id=MASK)


@pytest.mark.parametrize("overwrite", [False, True])
def test_survives_recomputation_and_compilation(overwrite: bool) -> None:
    rows, _ = make_rows(DiffusionProcess(NoiseSchedule(), MIXINGS["hybrid"]), 12)
    weight, hidden = torch.randn(PADDED, 16), torch.randn(12, 16, requires_grad=True)

    def loss(hidden: torch.Tensor) -> torch.Tensor:
        logits = hidden @ weight.t()
        return vocab_loss(logits, rows, vocab_size=V, mask_id=MASK, overwrite_logits=overwrite).loss_T.sum()

    (expected,) = torch.autograd.grad(loss(hidden), hidden)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for again in (compiled, partial(checkpoint, loss, use_reentrant=False)):
        (gradient,) = torch.autograd.grad(again(hidden), hidden)
        assert torch.equal(gradient, expected)
    hidden.grad = None
    checkpoint(loss, hidden, use_reentrant=True).backward()
    assert torch.equal(hidden.grad, expected)
