"""Megadiff: a discrete diffusion language model, its denoiser and its sampler, in one self-contained file.

The network reads a whole sequence, some of whose tokens are noise (masks, uniformly random ids, or a mix of
both), and predicts the clean token at every position. It is a bidirectional pre-norm Transformer with
RMSNorm, rotary positions, per-head QK-norm (or none) and a squared-ReLU MLP (or SwiGLU); no biases, no causal
mask, and no input that tells the noise level.

`model(ids).logits` are the raw predictions; `model.generate(prompt_ids)` writes text by starting from pure
noise and removing it step by step. The noise process is that of generalised interpolating discrete diffusion
(GIDD, arXiv 2503.04482, 2512.10858): at log signal-to-noise ratio λ a token survives with probability
α = sigmoid(λ), and is otherwise replaced by a uniformly random id with probability s(λ), or by the mask with
probability 1 − s(λ).

Shapes: B batch, L tokens, V vocabulary, H hidden, N heads, G key/value heads, D head size, R positions being
written.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, MaskedLMOutput

NOISE_TYPES = ("masked", "uniform", "hybrid")


class MegadiffConfig(PretrainedConfig):
    """Sizes of the denoiser and the noise it was trained on.

    `noise_type` is "masked", "uniform" or "hybrid"; for hybrid noise the share of uniform noise is
    s(λ) = sigmoid(noise_scale·λ + noise_shift). Training covered λ in [min_log_snr, max_log_snr] and
    sequences of `max_position_embeddings` tokens. With `shift_inputs` the network reads every token one place
    later, behind a BOS, as autoregressive models do; who calls the model need not care. `suppressed_token_ids`
    never occur in text and `generate` never writes them.
    """

    model_type = "megadiff"

    def __init__(
        self,
        vocab_size: int = 32000,
        hidden_size: int = 768,
        intermediate_size: int = 3072,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 12,
        num_key_value_heads: int | None = None,
        max_position_embeddings: int = 2048,
        rope_theta: float = 10000.0,
        rms_norm_eps: float = 1e-6,
        gated_mlp: bool = False,
        qk_norm: bool = True,
        shift_inputs: bool = False,
        noise_type: str = "hybrid",
        noise_shift: float = 0.0,
        noise_scale: float = 1.0,
        min_log_snr: float = -9.0,
        max_log_snr: float = 9.0,
        bos_token_id: int = 0,
        eos_token_id: int = 1,
        pad_token_id: int = 2,
        mask_token_id: int = 3,
        suppressed_token_ids: Sequence[int] = (),
        tie_word_embeddings: bool = False,
        **kwargs,
    ):
        if noise_type not in NOISE_TYPES:
            raise ValueError(f"noise_type is {noise_type!r}, expected one of {', '.join(NOISE_TYPES)}.")
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads or num_attention_heads
        self.max_position_embeddings = max_position_embeddings
        self.rope_theta = rope_theta
        self.rms_norm_eps = rms_norm_eps
        self.gated_mlp = gated_mlp
        self.qk_norm = qk_norm
        self.shift_inputs = shift_inputs
        self.noise_type = noise_type
        self.noise_shift = noise_shift
        self.noise_scale = noise_scale
        self.min_log_snr = min_log_snr
        self.max_log_snr = max_log_snr
        self.mask_token_id = mask_token_id
        self.suppressed_token_ids = list(suppressed_token_ids)
        kwargs.update(bos_token_id=bos_token_id, eos_token_id=eos_token_id, pad_token_id=pad_token_id)
        kwargs.update(tie_word_embeddings=tie_word_embeddings)
        super().__init__(**kwargs)


class MegadiffRMSNorm(nn.Module):
    """Root-mean-square normalisation over the last axis, computed in float32."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x_float = x.float()
        inverse_rms = torch.rsqrt(x_float.square().mean(-1, keepdim=True) + self.eps)
        return (x_float * inverse_rms * self.weight.float()).to(x.dtype)


def rotary_tables(position_ids_BL: Tensor, head_size: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the rotary angles, float32 [B, 1, L, D]; the two halves of D share angles."""
    exponent = torch.arange(0, head_size, 2, dtype=torch.float32, device=position_ids_BL.device) / head_size
    angles = position_ids_BL[:, None, :, None].float() * theta**-exponent
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn every pair (x_d, x_{d + D/2}) by its position's angle, in float32, rounded once."""
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)


class MegadiffAttention(nn.Module):
    """Bidirectional attention: every token sees every token that is not padding."""

    def __init__(self, config: MegadiffConfig):
        super().__init__()
        self.head_size = config.hidden_size // config.num_attention_heads
        kv_size = config.num_key_value_heads * self.head_size
        self.share_kv = config.num_key_value_heads != config.num_attention_heads
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.q_norm, self.k_norm = (
            MegadiffRMSNorm(self.head_size, config.rms_norm_eps) if config.qk_norm else nn.Identity() for _ in "qk"
        )

    def forward(self, x_BLH: Tensor, rotary: tuple[Tensor, Tensor], visible: Tensor | None) -> Tensor:
        q, k, v = (
            projection(x_BLH).unflatten(-1, (-1, self.head_size)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(self.q_norm(q), *rotary), rotate(self.k_norm(k), *rotary)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=self.share_kv)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))


class MegadiffMLP(nn.Module):
    def __init__(self, config: MegadiffConfig):
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.gate_proj = None
        if config.gated_mlp:
            self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.gate_proj is None:
            return self.down_proj(F.relu(self.up_proj(x)).square())
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class MegadiffBlock(nn.Module):
    def __init__(self, config: MegadiffConfig):
        super().__init__()
        self.input_layernorm = MegadiffRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = MegadiffAttention(config)
        self.post_attention_layernorm = MegadiffRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MegadiffMLP(config)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], visible: Tensor | None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rotary, visible)
        return x + self.mlp(self.post_attention_layernorm(x))


class MegadiffPreTrainedModel(PreTrainedModel):
    config: MegadiffConfig
    config_class = MegadiffConfig
    base_model_prefix = "model"
    _no_split_modules = ["MegadiffBlock"]  # noqa: RUF012
    _supports_sdpa = True


class MegadiffModel(MegadiffPreTrainedModel):
    """The denoiser without its output layer."""

    def __init__(self, config: MegadiffConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(MegadiffBlock(config) for _ in range(config.num_hidden_layers))
        self.norm = MegadiffRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> BaseModelOutput:
        """Hidden states [B, L, H]; the arguments are those of `MegadiffForDiffusionLM.forward`."""
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        head_size = self.config.hidden_size // self.config.num_attention_heads
        rotary = rotary_tables(position_ids, head_size, self.config.rope_theta)
        visible = None if attention_mask is None else attention_mask.bool()[:, None, None, :]

        x_BLH = self.embed_tokens(input_ids)
        for layer in self.layers:
            x_BLH = layer(x_BLH, rotary, visible)
        return BaseModelOutput(last_hidden_state=self.norm(x_BLH))


@dataclass(frozen=True)
class NoiseLevel:
    """What has become of a token at one noise level; the three shares sum to 1."""

    kept: float
    """α: it is still the clean token."""
    uniform: float
    """(1 − α)·s: it is an id drawn uniformly from the vocabulary without the mask."""
    masked: float
    """(1 − α)·(1 − s): it is the mask."""

    @classmethod
    def at(cls, log_snr: float, config: MegadiffConfig) -> "NoiseLevel":
        """The level of a log signal-to-noise ratio λ."""
        uniform, masked = noise_mix(log_snr, config)
        return cls(_sigmoid(log_snr), _sigmoid(-log_snr) * uniform, _sigmoid(-log_snr) * masked)

    def chance_of(self, is_mask: Tensor, vocab_size: int) -> Tensor:
        """(1 − α)·π(z), the chance that noise turned a token into this very z."""
        return torch.where(is_mask, self.masked, self.uniform / (vocab_size - 1))


def noise_mix(log_snr: float, config: MegadiffConfig) -> tuple[float, float]:
    """The shares of uniform noise and of masks among noise, s(λ) and 1 − s(λ)."""
    if config.noise_type == "hybrid":
        log_odds = config.noise_scale * log_snr + config.noise_shift
        return _sigmoid(log_odds), _sigmoid(-log_odds)
    return (1.0, 0.0) if config.noise_type == "uniform" else (0.0, 1.0)


def denoising_levels(num_steps: int, config: MegadiffConfig) -> list[NoiseLevel]:
    """The levels that sampling passes: `num_steps` noisy ones on a cosine grid of α, then clean text.

    α runs over the range of training, slowly at both ends (the grid of arXiv 2512.10858's released sampler).
    """
    lowest, highest = _sigmoid(config.min_log_snr), _sigmoid(config.max_log_snr)
    levels = []
    for step in range(num_steps):
        cleanness = (1 - math.cos(math.pi * step / num_steps)) / 2
        alpha = lowest + cleanness * (highest - lowest)
        one_minus_alpha = _sigmoid(-config.max_log_snr) + (1 - cleanness) * (highest - lowest)
        levels.append(NoiseLevel.at(math.log(alpha / one_minus_alpha), config))
    return [*levels, NoiseLevel(kept=1.0, uniform=0.0, masked=0.0)]


def draw_noised(
    clean_R: Tensor, level: NoiseLevel, config: MegadiffConfig, generator: torch.Generator | None
) -> Tensor:
    """Noise clean tokens to a level: z ~ q(· | x)."""
    u_R = torch.rand(clean_R.shape, generator=generator, device=clean_R.device)
    ids_R = torch.randint(config.vocab_size - 1, clean_R.shape, generator=generator, device=clean_R.device)
    uniform_R = ids_R + (ids_R >= config.mask_token_id)  # every id but the mask
    noise_R = torch.where(u_R < level.kept + level.uniform, uniform_R, config.mask_token_id)
    return torch.where(u_R < level.kept, clean_R, noise_R)


def keep_and_redraw_odds(
    noised_R: Tensor, xhat_RV: Tensor, now: NoiseLevel, then: NoiseLevel, config: MegadiffConfig
) -> tuple[Tensor, Tensor]:
    """Split p(z_s | z_t), a step from level t (`now`) to the cleaner level s (`then`), into two outcomes.

    p(z_s | z_t) is proportional to q_s(z_s | x̂) · q(z_t | z_s). With a = α_t/α_s the second factor is

        q(z_t | z_s) = a·1[z_s = z_t] + r,    r = (1 − α_t)·π_t(z_t) − a·(1 − α_s)·π_s(z_t),

    and r does not depend on z_s. So z_t is kept with odds a·q_s(z_t | x̂), and with odds r a new z_s is drawn
    from q_s(· | x̂). Returns both odds, [R] each.
    """
    is_mask_R = noised_R == config.mask_token_id
    a = now.kept / then.kept
    # r is at least 0; rounding may leave a little less
    r = NoiseLevel(0.0, max(0.0, now.uniform - a * then.uniform), max(0.0, now.masked - a * then.masked))
    xhat_of_z_R = xhat_RV.gather(1, noised_R[:, None]).squeeze(1)
    keep_R = a * (then.kept * xhat_of_z_R + then.chance_of(is_mask_R, config.vocab_size))
    return keep_R, r.chance_of(is_mask_R, config.vocab_size)


def denoising_step(
    noised_R: Tensor,
    xhat_RV: Tensor,
    now: NoiseLevel,
    then: NoiseLevel,
    config: MegadiffConfig,
    generator: torch.Generator | None,
) -> Tensor:
    """Draw z_s ~ p(z_s | z_t), one ancestral step."""
    keep_R, redraw_R = keep_and_redraw_odds(noised_R, xhat_RV, now, then, config)
    clean_R = torch.multinomial(xhat_RV, 1, generator=generator).squeeze(1)
    fresh_R = draw_noised(clean_R, then, config, generator)
    u_R = torch.rand(noised_R.shape, generator=generator, device=noised_R.device)
    return torch.where(u_R * (keep_R + redraw_R) < redraw_R, fresh_R, noised_R)


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


class MegadiffForDiffusionLM(MegadiffPreTrainedModel):
    """The denoiser with its output layer and an ancestral sampler."""

    def __init__(self, config: MegadiffConfig):
        super().__init__(config)
        self.model = MegadiffModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.model.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.model.embed_tokens = value

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Linear) -> None:
        self.lm_head = value

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> MaskedLMOutput:
        """Predict the clean token at every position of a noised sequence.

        Args:
            input_ids: [B, L] token ids, noise among them.
            attention_mask: [B, L], 0 where a token is padding and must not be seen.
            position_ids: [B, L] or [1, L]; 0, 1, 2, … if not given.

        Returns:
            `.logits` [B, L, V], raw: the mask still has one, though it is never a clean token.
            `xhat_log_probs` turns logits into the model's distribution over clean tokens.
        """
        if self.config.shift_inputs:
            starts = torch.zeros_like(input_ids, dtype=torch.bool)
            starts[:, 0] = True
            if attention_mask is not None:  # padding may stand before the first token
                starts[:, 1:] = attention_mask[:, :-1] == 0
            input_ids = input_ids.roll(1, dims=1).masked_fill(starts, self.config.bos_token_id)
        hidden_BLH = self.model(input_ids, attention_mask, position_ids).last_hidden_state
        return MaskedLMOutput(logits=self.lm_head(hidden_BLH))

    def xhat_log_probs(self, logits: Tensor) -> Tensor:
        """Log-probabilities of the clean token x̂, float32, of the shape of `logits`; −inf for the mask."""
        is_mask = torch.arange(logits.shape[-1], device=logits.device) == self.config.mask_token_id
        return logits.float().masked_fill(is_mask, -math.inf).log_softmax(-1)

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        max_new_tokens: int | None = None,
        num_denoising_steps: int = 64,
        temperature: float = 1.0,
        seed: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Write text by ancestral sampling: start from pure noise, remove it in `num_denoising_steps` steps.

        Args:
            input_ids: [B, P] prompts. They stay as they are, except for mask ids in them: these are written
                too, so that a text with masks is filled in. None, or shape [B, 0], writes freely.
            attention_mask: [B, P], 0 where the prompt is padding (pad prompts of unequal length on the left).
            max_new_tokens: Tokens to write after the prompt; by default as many as the trained length leaves.
            num_denoising_steps: More steps, better text; each is one pass through the network.
            temperature: Divides the logits; below 1 the text gets safer and more repetitive.
            seed: Makes the draw repeatable; or give a `generator` on the model's device.

        Returns:
            [B, P + max_new_tokens] ids, without any mask.

        Raises:
            ValueError: If the numbers make no sense or the sequence would be longer than those of training.
        """
        config, device = self.config, self.device
        if num_denoising_steps < 1:
            raise ValueError(f"num_denoising_steps is {num_denoising_steps}, expected at least 1.")
        if not temperature > 0:
            raise ValueError(f"temperature is {temperature}, expected a positive number.")
        if seed is not None:
            if generator is not None:
                raise ValueError("seed and generator are both given, expected one of them.")
            generator = torch.Generator(device).manual_seed(seed)
        if input_ids is None:
            input_ids = torch.empty(1, 0, dtype=torch.long, device=device)
        if input_ids.dim() != 2:
            raise ValueError(f"input_ids has shape {tuple(input_ids.shape)}, expected [batch, tokens].")
        room = config.max_position_embeddings - input_ids.shape[1]
        if max_new_tokens is None:
            max_new_tokens = room
        if not 0 <= max_new_tokens <= room:
            raise ValueError(
                f"max_new_tokens is {max_new_tokens}, expected 0 to {room}: the prompt has"
                f" {input_ids.shape[1]} tokens and the model was trained on {config.max_position_embeddings}."
            )

        z_BL = F.pad(input_ids.long(), (0, max_new_tokens), value=config.mask_token_id)
        if attention_mask is not None:
            attention_mask = F.pad(attention_mask, (0, max_new_tokens), value=1)
        written_BL = z_BL == config.mask_token_id
        if not written_BL.any():
            raise ValueError("max_new_tokens is 0 and input_ids holds no mask id: there is nothing to write.")

        uniform, masked = noise_mix(config.min_log_snr, config)
        pure_noise = NoiseLevel(kept=0.0, uniform=uniform, masked=masked)
        z_BL[written_BL] = draw_noised(z_BL[written_BL], pure_noise, config, generator)
        levels = denoising_levels(num_denoising_steps, config)
        for now, then in pairwise(levels):
            logits_RV = self(z_BL, attention_mask).logits[written_BL].float()
            logits_RV[:, config.suppressed_token_ids] = -math.inf
            xhat_RV = self.xhat_log_probs(logits_RV / temperature).exp()
            z_BL[written_BL] = denoising_step(z_BL[written_BL], xhat_RV, now, then, config, generator)
        return z_BL
