"""The mathematics of discrete diffusion: torch only, float64-capable, no device policy.

Everything is a function of the log-SNR. Reading order: schedule, mixing, process, nelbo (the bound, written
densely), noising (drawing noise), gaussian (uniform noise as an argmax), samples (what an objective is given), augment
(what training does to them), rows (what the loss needs per position), masking (which tokens hide), layout (who sees
whom), objectives, samplers, decoding (samplers of models whose finished tokens are computed once).
"""

from megadiff.diffusion.augment import Augmentation
from megadiff.diffusion.decoding import Decode, autoregressive_sample, block_diffusion_sample, eso_lm_sample
from megadiff.diffusion.gaussian import GaussianCurriculum, gamma_range
from megadiff.diffusion.layout import AttentionLayout, document_numbers
from megadiff.diffusion.masking import ExactCountMasking, LevelMasking, Masking
from megadiff.diffusion.mixing import HybridMixing, MaskedMixing, MixingDistribution, UniformMixing
from megadiff.diffusion.nelbo import NelboTerms, nelbo_terms
from megadiff.diffusion.noising import (
    NoisedRows,
    NoiseRows,
    corrupt,
    noise_rows,
    sequence_log_snr,
    sequence_time,
    token_log_snr,
)
from megadiff.diffusion.objectives import (
    AnnealedObjective,
    AutoregressiveObjective,
    BlockDiffusionObjective,
    DuoObjective,
    EsoLmObjective,
    GiddObjective,
    MdlmObjective,
    Objective,
    ShiftedObjective,
)
from megadiff.diffusion.process import DiffusionProcess
from megadiff.diffusion.rows import NoisedBatch, Rows, cross_entropy_rows
from megadiff.diffusion.samplers import ancestral_sample
from megadiff.diffusion.samples import Samples, random_lengths, shifted_inputs
from megadiff.diffusion.schedule import CosineSchedule, LogLinearSchedule, NoiseSchedule, TabulatedSchedule

__all__ = [
    "AnnealedObjective",
    "AttentionLayout",
    "Augmentation",
    "AutoregressiveObjective",
    "BlockDiffusionObjective",
    "CosineSchedule",
    "Decode",
    "DiffusionProcess",
    "DuoObjective",
    "EsoLmObjective",
    "ExactCountMasking",
    "GaussianCurriculum",
    "GiddObjective",
    "HybridMixing",
    "LevelMasking",
    "LogLinearSchedule",
    "MaskedMixing",
    "Masking",
    "MdlmObjective",
    "MixingDistribution",
    "NelboTerms",
    "NoiseRows",
    "NoiseSchedule",
    "NoisedBatch",
    "NoisedRows",
    "Objective",
    "Rows",
    "Samples",
    "ShiftedObjective",
    "TabulatedSchedule",
    "UniformMixing",
    "ancestral_sample",
    "autoregressive_sample",
    "block_diffusion_sample",
    "corrupt",
    "cross_entropy_rows",
    "document_numbers",
    "eso_lm_sample",
    "gamma_range",
    "nelbo_terms",
    "noise_rows",
    "random_lengths",
    "sequence_log_snr",
    "sequence_time",
    "shifted_inputs",
    "token_log_snr",
]
