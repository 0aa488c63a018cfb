"""Samplers of models in which finished tokens never look at unfinished ones: each token is computed once as finished.

They ask a `Decode` callable for logits, which remembers: a call feeds the tokens that were finished since the last one,
to be kept, and what is asked about now, never to be kept. That is exact, because in training a finished token sees
finished ones before it only, so that its keys and values do not depend on what comes later:

    autoregressive     finished tokens from left to right; the last of them predicts the next
    Eso-LM             finished tokens in the order of writing; masks ask for the next few
    block diffusion    finished blocks; the block in work asks for itself

Draws are pure functions of (seed, ordinal, position), as in `megadiff.diffusion.samplers`.

Shapes: B samples, L places of a canvas, Q places of one call, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal, Protocol

import torch
from torch import Tensor

from megadiff.diffusion.drawing import barred_ids, check_canvas, clean_probs, draw_once
from megadiff.diffusion.process import DiffusionProcess
from megadiff.diffusion.samplers import ancestral_sample
from megadiff.diffusion.samples import shifted_inputs
from megadiff.philox import WORD_RANGE, Purpose, random_words, uniform_from_words

Progress = Callable[[int, Tensor], None]
"""Called after each call of the model with the number of finished calls and the present ids [B, L]."""


class Decode(Protocol):
    """A model that remembers finished tokens."""

    def __call__(
        self, ids_BQ: Tensor, position_BQ: Tensor, block_Q: Tensor, num_kept: int, log_snr_BQ: Tensor | None = None
    ) -> Tensor:
        """Predict at new places.

        Args:
            ids_BQ: Ids of the new places, int64.
            position_BQ: Rotary positions of the new places, int64.
            block_Q: A new place sees everything kept, and the new places whose number here is not above its own; int64.
            num_kept: How many of the new places, the first ones, later calls see.
            log_snr_BQ: Noise levels of the new places, float64; None where the objective has none.

        Returns:
            Logits [B, Q, V].
        """
        ...


@torch.no_grad()
def autoregressive_sample(
    decode: Decode,
    canvas_BL: Tensor,
    fixed_BL: Tensor,
    seed: int,
    *,
    vocab_size: int,
    mask_id: int,
    bos_id: int,
    ordinal_B: Tensor | None = None,
    temperature: float = 1.0,
    excluded_ids: Iterable[int] = (),
    progress: Progress | None = None,
) -> Tensor:
    """Write the free places of a canvas from left to right.

    The first call reads BOS and the prompt that all samples have in front, every further one a single token.

    Args:
        decode: The model, without memories.
        canvas_BL: int64 ids; only those at fixed places are read, [B, L].
        fixed_BL: bool; True where the canvas is kept (a prompt), [B, L].
        seed: In [0, 2**64).
        vocab_size: V.
        mask_id: The mask, which is never written.
        bos_id: What stands before the first token.
        ordinal_B: int64 [B], which samples of the seed to draw; 0 … B − 1 when None.
        temperature: Divides the logits; positive.
        excluded_ids: Ids never written, besides the mask.
        progress: See `Progress`.

    Returns:
        int64 ids, [B, L], equal to the canvas at fixed places.

    Raises:
        ValueError: If an argument is out of range or shapes do not fit.
    """
    check_canvas(canvas_BL, fixed_BL, ordinal_B, temperature)
    ordinal_B, barred_V = _prepared(canvas_BL, ordinal_B, vocab_size, mask_id, excluded_ids)
    place_BL = torch.arange(canvas_BL.shape[1], device=canvas_BL.device).expand_as(canvas_BL)
    tokens_BL, num_read = canvas_BL.clone(), 0
    for call, place in enumerate(range(_prompt_length(fixed_BL), canvas_BL.shape[1])):
        new = slice(num_read, place + 1)
        ids_BQ = shifted_inputs(tokens_BL[:, : place + 1], bos_id)[:, new]
        logits_BQV = decode(ids_BQ, place_BL[:, new], place_BL[0, new], place + 1 - num_read)
        probs_B1V = clean_probs(logits_BQV[:, -1:], temperature, barred_V)
        here = slice(place, place + 1)
        drawn_B1 = draw_once(probs_B1V, place_BL[:, here], seed, ordinal_B)
        tokens_BL[:, here] = torch.where(fixed_BL[:, here], canvas_BL[:, here], drawn_B1)
        num_read = place + 1
        if progress is not None:
            progress(call + 1, tokens_BL)
    return tokens_BL


@torch.no_grad()
def eso_lm_sample(
    decode: Decode,
    canvas_BL: Tensor,
    fixed_BL: Tensor,
    seed: int,
    num_denoising_steps: int,
    *,
    vocab_size: int,
    mask_id: int,
    alpha_0: float,
    ordinal_B: Tensor | None = None,
    temperature: float = 1.0,
    excluded_ids: Iterable[int] = (),
    progress: Progress | None = None,
) -> Tensor:
    """Write the free places of a canvas by diffusion in a random order, and what is left from left to right.

    A free token is left over with probability 1 − α₀; the others are spread evenly over the denoising steps. So
    Binomial(remaining, (α_s − α_t)/(1 − α_t)) tokens are written in each; steps without any call nobody. Every sample
    has an order of its own, and all of a call have the same numbers of tokens per step, which the seed alone decides.
    A call reads the tokens of the last one, to keep them, and masks at the places that are next in the order: masks
    further on are seen by none of these in training either. The prompt is read first, in random order, as the clean
    tokens of training are.

    Args:
        decode: The model, without memories.
        canvas_BL: int64 ids; only those at fixed places are read, [B, L].
        fixed_BL: bool; True where the canvas is kept (a prompt), at equally many places of all samples, [B, L].
        seed: In [0, 2**64).
        num_denoising_steps: Steps of the diffusion, at least 1; it makes at most as many calls.
        vocab_size: V.
        mask_id: The mask, which is never written.
        alpha_0: Expected share of the free tokens that diffusion writes, in [0, 1].
        ordinal_B: int64 [B], which samples of the seed to draw; 0 … B − 1 when None.
        temperature: Divides the logits; positive.
        excluded_ids: Ids never written, besides the mask.
        progress: See `Progress`.

    Returns:
        int64 ids, [B, L], equal to the canvas at fixed places.

    Raises:
        ValueError: If an argument is out of range, shapes do not fit, or prompts have different lengths.

    Source: Sahoo et al., "Esoteric language models" (arXiv 2506.01928).
    """
    check_canvas(canvas_BL, fixed_BL, ordinal_B, temperature)
    if num_denoising_steps < 1:
        raise ValueError(f"num_denoising_steps must be at least 1, got {num_denoising_steps}; 128 is usual.")
    prompt_lengths = set(fixed_BL.sum(dim=1).tolist())
    if len(prompt_lengths) > 1:
        raise ValueError(
            f"fixed_BL must fix equally many places of all samples, got {sorted(prompt_lengths)}; sample prompts of "
            "different lengths one by one."
        )
    ordinal_B, barred_V = _prepared(canvas_BL, ordinal_B, vocab_size, mask_id, excluded_ids)
    num_given = prompt_lengths.pop()
    counts = _tokens_per_step(canvas_BL.shape[1] - num_given, alpha_0, num_denoising_steps, seed)
    num_sequential = canvas_BL.shape[1] - num_given - sum(counts)
    order_BL = _writing_order(fixed_BL, seed, ordinal_B, num_sequential)
    tokens_BL = torch.where(fixed_BL, canvas_BL, mask_id)
    num_read, num_written = 0, num_given
    for call, count in enumerate([*counts, *[1] * num_sequential]):
        new_BQ = order_BL[:, num_read : num_written + count]
        num_kept = num_written - num_read
        block_Q = torch.arange(new_BQ.shape[1], device=canvas_BL.device)
        logits_BQV = decode(tokens_BL.gather(1, new_BQ), new_BQ, block_Q, num_kept)
        asked_BQ = new_BQ[:, num_kept:]
        probs_BQV = clean_probs(logits_BQV[:, num_kept:], temperature, barred_V)
        tokens_BL = tokens_BL.scatter(1, asked_BQ, draw_once(probs_BQV, asked_BQ, seed, ordinal_B))
        num_read, num_written = num_written, num_written + count
        if progress is not None:
            progress(call + 1, tokens_BL)
    return tokens_BL


@torch.no_grad()
def block_diffusion_sample(
    decode: Decode,
    process: DiffusionProcess,
    canvas_BL: Tensor,
    fixed_BL: Tensor,
    seed: int,
    num_denoising_steps: int,
    *,
    block_size: int,
    ordinal_B: Tensor | None = None,
    temperature: float = 1.0,
    grid: Literal["cosine", "linear"] = "cosine",
    renewal: float = 0.0,
    excluded_ids: Iterable[int] = (),
    progress: Progress | None = None,
) -> Tensor:
    """Write the free places of a canvas block by block, each by `ancestral_sample`.

    Training shows the model a doubled sequence, whose noised block sees itself and the clean blocks before it, and
    whose clean blocks see themselves and the clean ones before. Here stand only the clean blocks before, which are
    kept, and the block in work: the same places see the same ones.

    Args:
        decode: The model, without memories.
        process: The process that the model was trained for.
        canvas_BL: int64 ids; only those at fixed places are read, [B, L].
        fixed_BL: bool; True where the canvas is kept (a prompt), [B, L].
        seed: In [0, 2**64).
        num_denoising_steps: Calls of the model per block; see `ancestral_sample`.
        block_size: Places of a block, at least 1; the last block may be shorter.
        ordinal_B: int64 [B], which samples of the seed to draw; 0 … B − 1 when None.
        temperature: Divides the logits; positive.
        grid: How α runs from noise to data; see `ancestral_sample`.
        renewal: Share of every step that noises tokens of the block anew; see `ancestral_sample`.
        excluded_ids: Ids never written, besides the mask.
        progress: See `Progress`.

    Returns:
        int64 ids, [B, L], equal to the canvas at fixed places.

    Raises:
        ValueError: If the block size is not positive, or `ancestral_sample` refuses an argument.

    Source: Arriola et al., "Block diffusion" (arXiv 2503.09573).
    """
    check_canvas(canvas_BL, fixed_BL, ordinal_B, temperature)
    if block_size < 1:
        raise ValueError(f"block_size must be at least 1, got {block_size}; use that of training.")
    length = canvas_BL.shape[1]
    place_BL = torch.arange(length, device=canvas_BL.device).expand_as(canvas_BL)
    tokens_BL, num_read, num_calls = canvas_BL.clone(), 0, 0
    for start in range(_prompt_length(fixed_BL) // block_size * block_size, length, block_size):
        block = slice(start, min(start + block_size, length))

        def denoise(noised_BK: Tensor, log_snr: Tensor, block: slice = block) -> Tensor:
            nonlocal num_read, num_calls
            new_BQ, num_kept = place_BL[:, num_read : block.stop], block.start - num_read
            ids_BQ = torch.cat([tokens_BL[:, num_read : block.start], noised_BK], dim=1)
            is_clean_BQ = (new_BQ < block.start) | fixed_BL[:, num_read : block.stop]
            log_snr_BQ = torch.where(is_clean_BQ, process.schedule.max_log_snr, log_snr)
            logits_BQV = decode(ids_BQ, new_BQ, new_BQ[0] // block_size, num_kept, log_snr_BQ)
            num_read, num_calls = block.start, num_calls + 1
            return logits_BQV[:, num_kept:]

        tokens_BL[:, block] = ancestral_sample(
            denoise,
            process,
            canvas_BL[:, block],
            fixed_BL[:, block],
            seed,
            num_denoising_steps,
            ordinal_B=ordinal_B,
            position_L=place_BL[0, block],
            temperature=temperature,
            grid=grid,
            renewal=renewal,
            excluded_ids=excluded_ids,
        )
        if progress is not None:
            progress(num_calls, tokens_BL)
    return tokens_BL


def _prepared(
    canvas_BL: Tensor, ordinal_B: Tensor | None, vocab_size: int, mask_id: int, excluded_ids: Iterable[int]
) -> tuple[Tensor, Tensor]:
    """Return the ordinals, given or counted, and which ids are barred, on the canvas' device."""
    barred_V = barred_ids(vocab_size, mask_id, excluded_ids).to(canvas_BL.device)
    if ordinal_B is None:
        ordinal_B = torch.arange(len(canvas_BL), device=canvas_BL.device)
    return ordinal_B, barred_V


def _prompt_length(fixed_BL: Tensor) -> int:
    """Return how many places in front are fixed in all samples."""
    return int(fixed_BL.all(dim=0).long().cumprod(0).sum())


def _tokens_per_step(num_free: int, alpha_0: float, num_denoising_steps: int, seed: int) -> list[int]:
    """Return how many tokens each step of the diffusion writes, without the steps that write none.

    Every free token is written when α, which rises by α₀/steps at a time, passes a level of its own.
    """
    place = torch.arange(num_free, device="cpu")
    level = uniform_from_words(random_words(seed, 0, place, Purpose.ORDER, block=1)[:, 0])
    step = (level[level < alpha_0] / alpha_0 * num_denoising_steps).long()
    return [count for count in step.bincount().tolist() if count]


def _writing_order(fixed_BL: Tensor, seed: int, ordinal_B: Tensor, num_sequential: int) -> Tensor:
    """Return the places in the order in which they are read and written, int64 [B, L].

    The fixed ones come first, then free ones, each at random, and at last so many free ones from left to right.
    """
    length = fixed_BL.shape[1]
    place_L = torch.arange(length, device=fixed_BL.device)
    word_BL = random_words(seed, ordinal_B[:, None], place_L, Purpose.ORDER)[..., 0]
    at_random_BL = ((~fixed_BL).long() * WORD_RANGE + word_BL).argsort(dim=1, stable=True)
    first_BK, last_BK = at_random_BL.split([length - num_sequential, num_sequential], dim=1)
    return torch.cat([first_BK, last_BK.sort(dim=1).values], dim=1)
