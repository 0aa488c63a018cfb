"""Output layer and loss in one, against the plain path: logits, then `vocab_loss`. Value, gradients, memory, ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from distributed import run_ranks
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megadiff.diffusion import (
    DiffusionProcess,
    GiddObjective,
    HybridMixing,
    MaskedMixing,
    NoiseSchedule,
    Rows,
    Samples,
    UniformMixing,
)
from megadiff.parallel.head_loss import HeadLoss, head_loss
from megadiff.parallel.vocab_loss import vocab_loss

V, MASK, PADDED, H, B, S = 50, 3, 64, 24, 3, 20
MIXINGS = {
    "masked": MaskedMixing(V, MASK),
    "hybrid": HybridMixing(V, MASK, 0.0),
    "uniform": UniformMixing(V, MASK),
}
VOCABULARY: dict[str, Any] = {"vocab_size": V, "mask_id": MASK}
KINDS = pytest.mark.parametrize("kind", [*MIXINGS, "cross-entropy"])
CHUNKS = pytest.mark.parametrize("chunk_rows", [1, 7, 1000])


def make_rows(kind: str) -> tuple[Rows, int | None]:
    """Rows [B, S] that an objective builds, some not counted, and its bound of those with weight."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(4, V, (B, S), generator=generator)
    counted = torch.rand(B, S, generator=generator) < 0.9
    if kind == "cross-entropy":
        one = counted.float()
        return Rows(
            target=tokens,
            noised=torch.full((B, S), MASK),
            alpha=torch.ones(B, S),
            uniform_mass=torch.zeros(B, S),
            kl_weight=one,
            is_weight=torch.zeros(B, S),
            elbo_weight=one,
            counted=counted,
            any_uniform_mass=False,
        ), None
    objective = GiddObjective(DiffusionProcess(NoiseSchedule(), MIXINGS[kind]))
    ordinals = torch.arange(B) + 5
    samples = Samples(tokens_BL=tokens, counted_BL=counted, ordinal_B=ordinals)
    return objective.noised_batch(samples, 1).rows, objective.count_active_rows(ordinals, S, 1)


def make_parameters(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Hidden states [S, B, H] and weight [W, H]."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(S, B, H, dtype=torch.float64, generator=generator)
    weight = 0.4 * torch.randn(PADDED, H, dtype=torch.float64, generator=generator)
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()


def plain_loss(hidden: Tensor, weight: Tensor, rows: Rows, **options: Any) -> HeadLoss:
    losses = vocab_loss(hidden.flatten(0, 1) @ weight.t(), rows, **VOCABULARY, **options)
    return HeadLoss(torch.where(rows.flat().counted, losses.loss_T, 0.0).sum(), *losses)


def with_gradients(losses: HeadLoss, hidden: Tensor, weight: Tensor, factor: float = 1.0) -> dict[str, Tensor]:
    gradients = torch.autograd.grad(factor * losses.loss, (hidden, weight))
    values = zip((*losses._fields, "hidden", "weight"), (*losses, *gradients), strict=True)
    return {name: value.detach() for name, value in values}


def deviation(ours: dict[str, Tensor], reference: dict[str, Tensor]) -> dict[str, float]:
    """Largest difference of each quantity, in units of its largest value."""
    assert all(value.isfinite().all() for value in (*ours.values(), *reference.values()))
    return {
        name: float((ours[name].double() - value).abs().max() / value.abs().max().clamp(min=1e-300))
        for name, value in reference.items()
    }


@KINDS
@CHUNKS
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-13)])
def test_equals_the_plain_path(kind: str, chunk_rows: int, dtype: torch.dtype, tolerance: float) -> None:
    rows, active_rows = make_rows(kind)
    hidden, weight = make_parameters(dtype)
    plain = with_gradients(plain_loss(hidden, weight, rows), hidden, weight, 2.5)
    bounds = [None] if active_rows is None else [None, active_rows, active_rows + 3, S * B + 5]
    for bound in bounds:
        fused = head_loss(hidden, weight, rows, **VOCABULARY, active_rows=bound, max_chunk_elements=chunk_rows * PADDED)
        worst = deviation(with_gradients(fused, hidden, weight, 2.5), plain)
        assert max(worst.values()) <= tolerance, (bound, worst)
        with torch.no_grad():
            again = head_loss(hidden, weight, rows, **VOCABULARY, active_rows=bound, max_chunk_elements=1)
        assert not again.loss.requires_grad and torch.allclose(again.loss_T, fused.loss_T, rtol=10 * tolerance)
    assert (active_rows is not None) == (kind == "masked")
    if active_rows is not None:  # the case is not empty: fewer rows have weight, and as many as the bound says or less
        active = rows.kl_weight != 0
        assert 0 < active.sum() <= active_rows < S * B


@KINDS
@CHUNKS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_error_in_16_bits_is_at_most_twice_that_of_the_plain_path(
    kind: str, chunk_rows: int, dtype: torch.dtype
) -> None:
    rows, active_rows = make_rows(kind)
    hidden, weight = make_parameters(dtype)
    exact_hidden, exact_weight = (value.detach().double().requires_grad_() for value in (hidden, weight))
    exact = with_gradients(plain_loss(exact_hidden, exact_weight, rows), exact_hidden, exact_weight)
    plain = deviation(with_gradients(plain_loss(hidden, weight, rows), hidden, weight), exact)
    losses = head_loss(
        hidden, weight, rows, **VOCABULARY, active_rows=active_rows, max_chunk_elements=chunk_rows * PADDED
    )
    fused = with_gradients(losses, hidden, weight)
    assert fused["weight"].dtype == fused["hidden"].dtype == dtype and fused["loss"].dtype == torch.float32
    for name, error in deviation(fused, exact).items():
        assert error <= 2 * plain[name], (name, error, plain[name])


def test_a_bound_that_is_too_small_makes_the_loss_nan() -> None:
    rows, _ = make_rows("masked")
    hidden, weight = make_parameters(torch.float32)
    num_active = int((rows.kl_weight != 0).sum())
    for bound, is_finite in ((num_active, True), (num_active - 1, False), (0, False)):
        losses = head_loss(hidden, weight, rows, **VOCABULARY, active_rows=bound)
        assert losses.loss.isfinite() == is_finite


@pytest.mark.parametrize("num_rows", [0, 1])
@pytest.mark.parametrize("active_rows", [None, 0, 1])
def test_no_rows_one_row_and_none_with_weight(num_rows: int, active_rows: int | None) -> None:
    rows, _ = make_rows("masked")
    few = {k: v.flatten()[:num_rows] if isinstance(v, Tensor) else v for k, v in vars(rows).items()}
    if active_rows == 0:
        few |= {"kl_weight": few["kl_weight"] * 0, "is_weight": few["is_weight"] * 0}
    else:
        few |= {"kl_weight": few["kl_weight"] * 0 + 1.5, "counted": few["counted"] | True}
    hidden, weight = make_parameters(torch.float32)
    hidden = hidden.detach()[:num_rows, :1].requires_grad_()
    plain = with_gradients(plain_loss(hidden, weight, Rows(**few)), hidden, weight)
    fused = with_gradients(
        head_loss(hidden, weight, Rows(**few), **VOCABULARY, active_rows=active_rows), hidden, weight
    )
    for name, value in plain.items():
        assert fused[name].shape == value.shape
        torch.testing.assert_close(fused[name], value, rtol=1e-6, atol=1e-7)
    assert (plain["loss"] != 0) == (num_rows == 1 and active_rows != 0)


@pytest.mark.parametrize("padded_selection", [False, True])
def test_rows_of_zero_weight_are_silent_even_with_broken_hidden_states(padded_selection: bool) -> None:
    rows, active_rows = make_rows("masked")
    assert active_rows is not None
    silent_SB = (rows.kl_weight == 0).t()
    hidden, weight = make_parameters(torch.float32)
    healthy = with_gradients(head_loss(hidden, weight, rows, **VOCABULARY), hidden, weight)
    broken = hidden.detach().masked_fill(silent_SB[..., None], torch.nan).requires_grad_()
    bound = active_rows + 5 if padded_selection else None
    losses = head_loss(broken, weight, rows, **VOCABULARY, active_rows=bound, max_chunk_elements=7 * PADDED)
    found = with_gradients(losses, broken, weight)
    assert (found["hidden"][silent_SB] == 0).all() and (found["loss_T"].view(S, B)[silent_SB] == 0).all()
    assert max(deviation(found, healthy).values()) <= 1e-6


def test_rows_that_are_not_counted_have_no_weight() -> None:
    rows, _ = make_rows("hybrid")
    hidden, weight = make_parameters(torch.float32)
    expected = with_gradients(head_loss(hidden, weight, rows, **VOCABULARY), hidden, weight)
    heavy = Rows(**{**vars(rows), "kl_weight": rows.kl_weight.where(rows.counted, 1.0)})
    found = with_gradients(head_loss(hidden, weight, heavy, **VOCABULARY), hidden, weight)
    assert not rows.counted.all() and all(torch.equal(found[name], value) for name, value in expected.items())


class Watch(TorchDispatchMode):
    """Records the largest tensor that any operator returns, and the products of matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = self.products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else (out,):
            if isinstance(value, Tensor):
                self.largest = max(self.largest, value.numel())
        self.products += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_)
        return out


def test_logits_of_all_rows_never_exist_and_nothing_is_multiplied_twice() -> None:
    rows, active_rows = make_rows("masked")
    assert active_rows is not None
    hidden, weight = make_parameters(torch.float32)
    with Watch() as plain:
        plain_loss(hidden, weight, rows).loss.backward()
    chunk_rows = 4
    num_chunks = -(-active_rows // chunk_rows)
    with Watch() as fused:
        losses = head_loss(
            hidden, weight, rows, **VOCABULARY, active_rows=active_rows, max_chunk_elements=chunk_rows * PADDED
        )
        assert fused.products == 3 * num_chunks
        losses.loss.backward()
    assert plain.largest == S * B * PADDED and plain.products == 3  # the watch sees what it should
    assert fused.products == 3 * num_chunks  # none in backward
    assert fused.largest == max(weight.numel(), hidden.numel()) < S * B * PADDED
    with Watch() as value_only, torch.no_grad():
        head_loss(hidden, weight, rows, **VOCABULARY, active_rows=active_rows)
    assert value_only.products == 1


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_computes_only_the_gradients_that_are_wanted(frozen: str) -> None:
    rows, _ = make_rows("hybrid")
    hidden, weight = make_parameters(torch.float32)
    expected = with_gradients(plain_loss(hidden, weight, rows), hidden, weight)
    (hidden if frozen == "hidden" else weight).requires_grad_(False)
    with Watch() as watch:
        losses = head_loss(hidden, weight, rows, **VOCABULARY)
    losses.loss.backward()
    (name, moving), still = ("weight", weight) if frozen == "hidden" else ("hidden", hidden), locals()[frozen]
    assert watch.products == 2 and still.grad is None and moving.grad is not None
    assert deviation({name: moving.grad}, {name: expected[name]})[name] <= 1e-6


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_second_backward_is_refused(dtype: torch.dtype) -> None:
    rows, _ = make_rows("hybrid")
    hidden, weight = make_parameters(dtype)
    losses = head_loss(hidden, weight, rows, **VOCABULARY)
    assert not (losses.loss_T.requires_grad or losses.kl_T.requires_grad or losses.is_T.requires_grad)
    losses.loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        losses.loss.backward()


def test_refuses_rows_and_shards_that_do_not_fit() -> None:
    rows, _ = make_rows("hybrid")
    hidden, weight = make_parameters(torch.float32)
    with pytest.raises(ValueError, match=r"60 tokens but there are 30 hidden states: .* need sequence_parallel=True"):
        head_loss(hidden[: S // 2], weight, rows, **VOCABULARY)
    with pytest.raises(ValueError, match="hold only 40"):
        head_loss(hidden, weight[:40], rows, **VOCABULARY)


RANK_CASES = [("masked", False), ("masked", True), ("hybrid", False), ("hybrid", True)]


def losses_on_two_ranks() -> list[dict[str, Any]]:
    """Fused and plain losses and gradients of this rank's shards, case by case, and what the fused path reduced."""
    import torch.distributed as dist
    from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region

    from megadiff.parallel import groups as parallel_groups

    groups = parallel_groups.initialize(parallel_groups.ParallelConfig(tensor_model_parallel_size=2))
    tp, reduced, all_reduce = groups.tp, [], dist.all_reduce

    def watched_all_reduce(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        reduced.append(tuple(tensor.shape))
        return all_reduce(tensor, *args, **kwargs)

    dist.all_reduce = watched_all_reduce
    found = []
    for kind, sequence_parallel in RANK_CASES:
        rows, active_rows = make_rows(kind)
        hidden, weight = make_parameters(torch.float32)
        weight = weight.detach().chunk(2)[tp.rank()].requires_grad_()
        plain = plain_loss(copy_to_tensor_model_parallel_region(hidden, group=tp), weight, rows, tp_group=tp)
        case = {"plain": with_gradients(plain, hidden, weight)}
        if sequence_parallel:
            hidden = hidden.detach().chunk(2)[tp.rank()].requires_grad_()
        reduced.clear()
        fused = head_loss(
            hidden,
            weight,
            rows,
            **VOCABULARY,
            tp_group=tp,
            sequence_parallel=sequence_parallel,
            active_rows=active_rows,
            max_chunk_elements=7 * weight.shape[0],
        )
        case["fused"] = with_gradients(fused, hidden, weight)
        case["reduced"] = list(reduced)
        found.append(case)
    dist.all_reduce = all_reduce
    parallel_groups.shutdown()
    return found


def test_two_ranks_equal_one_process() -> None:
    by_rank = run_ranks(2, losses_on_two_ranks)
    for i, (kind, sequence_parallel) in enumerate(RANK_CASES):
        rows, active_rows = make_rows(kind)
        hidden, weight = make_parameters(torch.float32)
        expected = with_gradients(plain_loss(hidden, weight, rows), hidden, weight)
        for rank, found in enumerate(by_rank):
            shard = expected | {"weight": expected["weight"].chunk(2)[rank]}
            assert max(deviation(found[i]["plain"], shard).values()) <= 1e-6
            if sequence_parallel:
                shard["hidden"] = shard["hidden"].chunk(2)[rank]
            assert max(deviation(found[i]["fused"], shard).values()) <= 1e-6

            # Over tp: the row sums of each chunk where there is uniform mass, and grad_hidden at most once.
            num_selected = active_rows if active_rows is not None else S * B
            of_hidden = [shape for shape in found[i]["reduced"] if shape[1] == H]
            assert of_hidden == ([] if sequence_parallel else [(num_selected, H)])
            assert len(found[i]["reduced"]) - len(of_hidden) == (-(-num_selected // 7) if kind == "hybrid" else 0)
