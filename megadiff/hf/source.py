"""What an export needs to know about a checkpoint, gathered from its files and checked.

step_00000400/config.yaml      the run's resolved configuration: sections model, objective, data
              manifest.json    step, consumed samples, vocabulary sizes, special ids, hashes, the last validation
              tokenizer.model  SentencePiece; may be absent
              state/           the distributed checkpoint
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sentencepiece
import yaml
from torch import Tensor

from megadiff.hf.distcp import DistributedCheckpoint
from megadiff.hf.mapping import ModelSizes
from megadiff.integrity import damage, read_manifest
from megadiff.models.parametrization import Scales

logger = logging.getLogger(__name__)

_NOISES = ("masked", "uniform", "hybrid")
_AVERAGE = "ema."
_NOT_THE_MODEL = re.compile(r"optimizer\.|chained_\d+\.|" + re.escape(_AVERAGE))
_STEP = re.compile(r"step_(\d{8,})")  # as training names them: anything else in the folder is unfinished or foreign


@dataclass(frozen=True, kw_only=True)
class Source:
    """A checkpoint, opened: the facts, and the model's tensors by canonical name (read when asked for).

    The exported model knows no multipliers of its parametrisation: they are part of the tensors.
    """

    folder: Path
    tensors: Mapping[str, Tensor]
    sizes: ModelSizes
    rotary_base: float
    layernorm_epsilon: float
    sequence_length: int
    noise: str
    shift: float
    scale: float
    min_log_snr: float
    max_log_snr: float
    shift_inputs: bool
    """Whether the model was trained to read every token one place later."""
    bos_id: int
    eos_id: int
    pad_id: int
    mask_id: int
    step: int
    consumed_tokens: int
    ema_decay: float | None
    """Of the moving average that `tensors` are; None where they are the trained weights themselves."""
    validation: Mapping[str, float]
    """The last validation of the trained weights before the checkpoint, empty if there was none."""
    corpus_sha256: str | None
    """SHA-256 over the documents of the corpus, both splits."""
    corpus_python: str | None
    """Version of the Python that prepared the corpus."""
    tokenizer: sentencepiece.SentencePieceProcessor | None

    @classmethod
    def open(cls, path: Path, *, weights: str = "model") -> Source:
        """Open a checkpoint, or the newest one of a run directory.

        Args:
            path: The checkpoint or run directory.
            weights: "model" for the trained weights, "ema" for their exponential moving average.

        Raises:
            ValueError: If there is none, its files are unreadable, incomplete or contradict each other, or it holds no
                average.
        """
        folder = _find_checkpoint(path)
        config = _Section(folder / "config.yaml", yaml.safe_load)
        manifest = _Section(folder / "manifest.json", json.loads)
        if problems := damage(folder, read_manifest(folder)):
            raise ValueError(f"checkpoint {folder} is damaged: {', '.join(problems)}; use another checkpoint.")
        model, objective = config.section("model"), config.section("objective")

        if model.content.get("log_snr_conditioning"):
            raise ValueError(
                f"{folder} holds a denoiser that is conditioned on the noise level (model.log_snr_conditioning), which "
                "the exported model cannot be told: export one that is not."
            )
        if objective.content.get("prompt_fraction") or (
            config.section("data").content.get("kind") == "examples" and objective.content.get("name") == "gidd"
        ):
            raise ValueError(
                f"{folder} was trained on prompts that see only themselves (two-level attention), which the exported "
                "model cannot do yet: write with `megadiff generate`."
            )
        annealing = objective.content.get("attention_annealing_samples") or 0
        if annealing and manifest.number("consumed_samples") < annealing:
            raise ValueError(
                f"{folder} has seen {manifest.number('consumed_samples')} of the {annealing} samples over which its "
                "attention becomes bidirectional, as the exported model's is: train on."
            )
        num_attention_heads = model.number("num_attention_heads")
        hidden_size = model.number("hidden_size")
        sizes = ModelSizes(
            num_layers=model.number("num_layers"),
            hidden_size=hidden_size,
            num_attention_heads=num_attention_heads,
            num_query_groups=model.number("num_query_groups", default=num_attention_heads),
            ffn_hidden_size=model.number("ffn_hidden_size", default=4 * hidden_size),
            vocab_size=manifest.number("vocab_size"),
            padded_vocab_size=manifest.number("padded_vocab_size"),
            # Absent in checkpoints of versions that knew no other.
            is_gated=model.content.get("activation") == "swiglu",
            qk_layernorm=model.content.get("qk_layernorm", True),
        )
        if weights == "ema" and manifest.content.get("ema_decay") is None:
            raise ValueError(
                f"{folder} holds no average of the weights: the run had no optimizer.ema_decay; export --weights model."
            )
        sequence_length = config.section("data").number("sequence_length")
        tensors = DistributedCheckpoint(
            folder / "state", ignore=_NOT_THE_MODEL.match, prefix=_AVERAGE if weights == "ema" else ""
        )
        scales = Scales.of(
            model.content.get("parametrization", "standard"), num_layers=sizes.num_layers, hidden_size=hidden_size
        )
        return cls(
            folder=folder,
            tensors=_Multiplied(tensors, scales.multiplier),
            sizes=sizes,
            rotary_base=model.number("rotary_base"),
            layernorm_epsilon=model.number("layernorm_epsilon"),
            sequence_length=sequence_length,
            **_noise_of(objective),
            shift_inputs=objective.content.get("shift_inputs", False),
            bos_id=manifest.number("bos_id"),
            eos_id=manifest.number("eos_id"),
            pad_id=manifest.number("pad_id"),
            mask_id=manifest.number("mask_id"),
            step=manifest.number("step"),
            consumed_tokens=manifest.number("consumed_samples") * sequence_length,
            ema_decay=manifest.number("ema_decay") if weights == "ema" else None,
            validation=manifest.content.get("validation") or {},
            corpus_sha256=manifest.content.get("corpus_sha256"),
            corpus_python=manifest.content.get("corpus_python"),
            tokenizer=_read_tokenizer(
                folder / "tokenizer.model", sizes.vocab_size, manifest.content.get("tokenizer_sha256")
            ),
        )


class _Multiplied(Mapping[str, Tensor]):
    """Tensors times factors that depend on their names."""

    def __init__(self, tensors: Mapping[str, Tensor], factor: Callable[[str], float]) -> None:
        self._tensors, self._factor = tensors, factor

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __getitem__(self, name: str) -> Tensor:
        factor = self._factor(name)
        weight = self._tensors[name]
        # In fp32: the export may have a wider type than the checkpoint, which need not hold the product.
        return weight if factor == 1.0 else weight.float() * factor


class _Section:
    """A mapping read from a file, that names the file and the key when something is missing."""

    def __init__(self, path: Path, parse: Any = None, content: Any = None, prefix: str = "") -> None:
        self.path, self.prefix = path, prefix
        self.content: dict[str, Any] = content
        if parse is not None:
            try:
                self.content = parse(path.read_text(encoding="utf-8"))
            except (OSError, ValueError, yaml.YAMLError) as error:
                reason = " ".join(str(error).split())
                raise ValueError(f"{path} cannot be read ({reason}); use another checkpoint.") from error
        if not isinstance(self.content, dict):
            raise ValueError(
                f"{prefix or 'the content'} of {path} is a {type(self.content).__name__}, expected a mapping;"
                " use another checkpoint."
            )

    def section(self, name: str) -> _Section:
        return _Section(self.path, content=self.content.get(name), prefix=name)

    def number(self, name: str, default: Any = None) -> Any:
        """The number under `name`; a null or absent one is `default`, where there is a default."""
        value = self.content.get(name)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float):
            full_name = f"{self.prefix}.{name}" if self.prefix else name
            raise ValueError(f"{full_name} in {self.path} is {value!r}, expected a number; use another checkpoint.")
        return value


def _noise_of(objective: _Section) -> dict[str, Any]:
    """The fields of a `Source` that tell the noise, where an objective's models can be exported.

    Raises:
        ValueError: If they cannot: the exported code denoises whole sequences under bidirectional attention.
    """
    name = objective.content.get("name")
    if name == "mdlm":
        # Log-linear: α is ε at time 1, and 1 − (1 − ε)·ε at time ε.
        epsilon = objective.number("epsilon")
        ends = (epsilon, 1 - (1 - epsilon) * epsilon)
        lowest, highest = (math.log(alpha / (1 - alpha)) for alpha in ends)
        return {"noise": "masked", "shift": 0.0, "scale": 1.0, "min_log_snr": lowest, "max_log_snr": highest}
    if name != "gidd":
        raise ValueError(
            f"objective.name in {objective.path} is {name!r}, whose models cannot be exported yet: only those of gidd"
            " and mdlm can."
        )
    noise = objective.content.get("noise")
    if noise not in _NOISES:
        raise ValueError(
            f"objective.noise in {objective.path} is {noise!r}, expected one of"
            f" {', '.join(_NOISES)}: only these can be exported."
        )
    return {
        "noise": noise,
        "shift": objective.number("shift", default=0.0),
        "scale": objective.number("scale", default=1.0),
        "min_log_snr": objective.number("min_log_snr"),
        "max_log_snr": objective.number("max_log_snr"),
    }


def _find_checkpoint(path: Path) -> Path:
    if (path / "manifest.json").is_file() and (path / "state").is_dir():
        return path
    if (path / "checkpoints").is_dir():
        children = (path / "checkpoints").iterdir()
        steps = {int(match[1]): child for child in children if (match := _STEP.fullmatch(child.name))}
        if not steps:
            raise ValueError(f"{path} is a run without checkpoints; train until the first is saved.")
        newest = steps[max(steps)]
        logger.info("%s is a run; taking its newest checkpoint, %s", path, newest.name)
        return newest
    raise ValueError(
        f"{path} is no checkpoint: it lacks manifest.json and state/; give RUN/checkpoints/step_…, or RUN."
    )


def _read_tokenizer(
    path: Path, vocab_size: int, expected_sha256: str | None
) -> sentencepiece.SentencePieceProcessor | None:
    if not path.is_file():
        return None
    model = path.read_bytes()
    sha256 = hashlib.sha256(model).hexdigest()
    if expected_sha256 not in (None, sha256):
        raise ValueError(
            f"{path} has the SHA-256 {sha256}, expected {expected_sha256} as in manifest.json: it is not the tokenizer"
            " that the model was trained with; put that one in its place or use another checkpoint."
        )
    try:
        tokenizer = sentencepiece.SentencePieceProcessor()
        tokenizer.LoadFromSerializedProto(model)
    except RuntimeError as error:
        raise ValueError(f"{path} is no SentencePiece model; use another checkpoint.") from error
    if tokenizer.vocab_size() != vocab_size:
        raise ValueError(
            f"{path} has {tokenizer.vocab_size()} pieces, expected the model's {vocab_size};"
            " it belongs to another model."
        )
    return tokenizer
