"""The README of an export: how to load and sample it, what it is, and what is known of its training."""

from __future__ import annotations

import math

from megadiff.hf.source import Source


def model_card(source: Source, name: str) -> str:
    """Write the model card, Markdown with the front matter that the Hub reads; `name` is the export's directory."""
    usage = _LOAD_WITH_TOKENIZER if source.tokenizer else _LOAD_WITHOUT_TOKENIZER
    facts = "\n".join(f"| {label} | {value} |" for label, value in _facts(source))
    return _CARD.format(name=name, usage=usage.format(name=name), facts=facts)


def _facts(source: Source) -> list[tuple[str, str]]:
    sizes = source.sizes
    noise = source.noise
    if noise == "hybrid":
        noise += f", uniform share sigmoid({source.scale:g}·λ {source.shift:+g})"
    facts = [
        ("noise", f"{noise}; log-SNR λ from {source.min_log_snr:g} to {source.max_log_snr:g}"),
        ("training", f"{source.step:,} steps, {source.consumed_tokens:,} tokens"),
        ("sequence length", f"{source.sequence_length:,}"),
        (
            "layers × hidden × heads",
            f"{sizes.num_layers} × {sizes.hidden_size} × {sizes.num_attention_heads}",
        ),
        ("vocabulary", f"{sizes.vocab_size:,}, the mask is id {source.mask_id}"),
    ]
    if source.ema_decay is not None:
        facts.append(("weights", f"exponential moving average, decay {source.ema_decay:g} per step"))
    if source.corpus_sha256 is not None:
        prepared = f", prepared with Python {source.corpus_python}" if source.corpus_python is not None else ""
        facts.append(("corpus", f"SHA-256 {source.corpus_sha256}{prepared}"))
    measured = f", measured at step {source.validation['step']:,}" if "step" in source.validation else ""
    if source.ema_decay is not None and measured:
        measured += " without averaging"
    if "nelbo" in source.validation:
        nelbo, stderr = source.validation["nelbo"], source.validation.get("stderr")
        error = f" ± {stderr:.4f}" if stderr is not None else ""
        bound = f"{nelbo:.4f}{error} nats per token (perplexity at most {math.exp(nelbo):.2f})"
        facts.append(("bound on −log p", bound + measured))
    if "bits_per_byte" in source.validation:
        facts.append(("bound in bits per byte", f"{source.validation['bits_per_byte']:.4f}{measured}"))
    return facts


_LOAD_WITH_TOKENIZER = """\
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("{name}", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("{name}", trust_remote_code=True)
prompt = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt, num_denoising_steps=64)[0]))"""

_LOAD_WITHOUT_TOKENIZER = """\
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("{name}", trust_remote_code=True)
print(model.generate(num_denoising_steps=64)[0].tolist())"""

_CARD = """\
---
library_name: transformers
tags:
- diffusion
- discrete-diffusion
- megadiff
---
# {name}

A discrete diffusion language model trained with megadiff. It denoises whole sequences instead of predicting
the next token: a bidirectional Transformer that turns a partly noised text into a guess of the clean one.

```python
{usage}
```

`model(ids).logits` are the raw predictions for a noised sequence; `model.xhat_log_probs(logits)` are
log-probabilities of clean tokens. `generate` keeps the prompt and fills in any mask ids that it holds. The
code that ships with the weights is one file, `modeling_megadiff.py`.

| | |
|---|---|
{facts}

The bound is an estimate of an upper bound on the negative log-likelihood of held-out text.
"""
