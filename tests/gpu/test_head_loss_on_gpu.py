"""The fused head on a GPU: products of 16-bit factors into an fp32 sum, memory of one chunk, no waiting."""

from __future__ import annotations

import pytest
import torch
from ops.cases import MASK, make_case

from megadiff.diffusion import Rows
from megadiff.parallel.head_loss import head_loss
from megadiff.parallel.vocab_loss import vocab_loss

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
H = 512


def rows_on_gpu(noise: str, num_rows: int, vocab_size: int) -> Rows:
    case = make_case(noise, num_rows, vocab_size)
    fields = {name: field.cuda() for name, field in case.targets._asdict().items()}
    return Rows(
        **fields,
        elbo_weight=fields["kl_weight"],
        counted=torch.ones(num_rows, dtype=torch.bool, device="cuda"),
        any_uniform_mass=case.process.any_uniform_mass,
    )


def hidden_and_weight(num_rows: int, vocab_size: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator("cuda").manual_seed(0)
    hidden = torch.randn(num_rows, 1, H, generator=generator, device="cuda")
    weight = torch.randn(vocab_size, H, generator=generator, device="cuda") * H**-0.5
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("noise", ["masked", "hybrid 0"])
def test_equals_the_plain_path(noise: str, dtype: torch.dtype) -> None:
    num_rows, vocab_size = 384, 32_768
    rows = rows_on_gpu(noise, num_rows, vocab_size)
    hidden, weight = hidden_and_weight(num_rows, vocab_size, dtype)
    active = int(((rows.kl_weight != 0) | (rows.is_weight != 0)).sum())

    def gradients(of: tuple[torch.Tensor, torch.Tensor], fused: bool) -> list[torch.Tensor]:
        hidden, weight = of
        if fused:
            loss = head_loss(
                hidden, weight, rows, vocab_size=vocab_size, mask_id=MASK, active_rows=active,
                max_chunk_elements=vocab_size * 100,
            ).loss  # fmt: skip
        else:
            logits = hidden[:, 0] @ weight.t()
            loss = vocab_loss(logits, rows, vocab_size=vocab_size, mask_id=MASK).loss_T.sum()
        return [loss.detach(), *torch.autograd.grad(loss, of)]

    exact = gradients((hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()), False)
    for ours, plain, best in zip(
        gradients((hidden, weight), True), gradients((hidden, weight), False), exact, strict=True
    ):
        error, budget = ((value.double() - best).norm() / best.norm() for value in (ours, plain))
        assert error <= 2 * budget + torch.finfo(dtype).eps


def test_memory_is_that_of_one_chunk_whatever_the_vocabulary() -> None:
    num_rows, chunk = 4096, 2**24

    def extra(vocab_size: int) -> int:
        rows = rows_on_gpu("hybrid 0", num_rows, vocab_size)
        hidden, weight = hidden_and_weight(num_rows, vocab_size, torch.bfloat16)
        weight.requires_grad_(False)  # its gradient is as large as itself in any case
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss = head_loss(hidden, weight, rows, vocab_size=vocab_size, mask_id=MASK, max_chunk_elements=chunk).loss
        loss.backward()
        return torch.cuda.max_memory_allocated() - before

    small, large = extra(32_768), extra(131_072)
    assert large <= 1.1 * small
    assert large < 2 * chunk * 2 + 16 * num_rows * H


def test_a_graph_captures_forward_and_backward() -> None:
    """Nothing waits for the device, not even inside the library: a capture would refuse it."""
    rows = rows_on_gpu("masked", 512, 32_768)
    parameters = hidden_and_weight(512, 32_768, torch.bfloat16)

    def step() -> tuple[torch.Tensor, ...]:
        loss = head_loss(*parameters, rows, vocab_size=32_768, mask_id=MASK, active_rows=400).loss
        return (loss.detach(), *torch.autograd.grad(loss, parameters))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        expected = [value.clone() for value in step()]
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    for value, reference in zip(captured, expected, strict=True):
        torch.testing.assert_close(value, reference)
