"""Where the noise process meets the fused operator: diffusion knows formulas, ops knows numbers, neither the other."""

from __future__ import annotations

from torch import Tensor

from megadiff.diffusion import DiffusionProcess, NoisedRows, noise_rows
from megadiff.diffusion.noising import token_purpose
from megadiff.ops import noising as ops


def fused_noise_rows(
    tokens_BL: Tensor,
    log_snr_BL: Tensor,
    ordinal_B: Tensor,
    counted_BL: Tensor,
    seed: int,
    process: DiffusionProcess,
    *,
    validation: bool = False,
    position_L: Tensor | None = None,
) -> NoisedRows:
    """`megadiff.diffusion.noise_rows` in one pass where there is a kernel for the device, itself where there is none.

    For equal log-SNR the noised tokens are those of the eager version but for a chance below 2**-50 per token, the
    numbers within one unit in the last place of float32.
    """
    if not ops.is_native(tokens_BL.device):
        return noise_rows(
            tokens_BL, log_snr_BL, ordinal_B, counted_BL, seed, process, validation=validation, position_L=position_L
        )
    mixing = process.mixing
    log_snr_BL = log_snr_BL.double()
    noised, alpha, uniform_mass, loss_weight, elbo_weight = ops.noise_rows(
        tokens_BL,
        log_snr_BL,
        process.schedule.log_snr_pdf(log_snr_BL),
        ordinal_B,
        counted_BL,
        seed=seed,
        purpose=token_purpose(validation),
        scale=mixing.scale,
        shift=mixing.shift,
        num_uniform_states=mixing.num_uniform_states,
        mask_id=mixing.mask_id,
        mask_is_uniform_state=mixing.mask_is_uniform_state,
        position_L=position_L,
    )
    return NoisedRows(
        noised=noised, alpha=alpha, uniform_mass=uniform_mass, loss_weight=loss_weight, elbo_weight=elbo_weight
    )
