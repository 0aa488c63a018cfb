"""A run's configuration: the leaf configurations of the rooms, composed and checked against each other.

A recipe is a Python file with one function `config() -> TrainConfig`; the command line replaces single fields; the
result is written into the run directory and into every checkpoint.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from megadiff import fields
from megadiff.data.corpus import Corpus
from megadiff.data.loader import DataConfig
from megadiff.evaluation.likelihood import ValidationConfig
from megadiff.models.accounting import TokenFlops, flops_per_token
from megadiff.models.config import AttentionBackend, DenoiserConfig, TransformerImpl
from megadiff.models.fp8 import Fp8Config
from megadiff.objectives import OBJECTIVES, GiddConfig, ObjectiveConfig, Vocabulary
from megadiff.parallel.groups import Groups, ParallelConfig
from megadiff.training.checkpoint import CheckpointConfig
from megadiff.training.config import TrainingConfig
from megadiff.training.optimizer import OptimizerConfig
from megadiff.training.sinks import WatchConfig
from megadiff.training.step import DenoisingStep


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that defines a run except where it is stored and how many processes it has."""

    model: DenoiserConfig = field(default_factory=DenoiserConfig)
    objective: ObjectiveConfig = field(default_factory=GiddConfig)
    data: DataConfig
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    fp8: Fp8Config = field(default_factory=Fp8Config)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    watch: WatchConfig = field(default_factory=WatchConfig)

    def check(self, world_size: int) -> None:
        """Check that the parts fit together in a job of `world_size` processes that trains.

        Raises:
            ValueError: naming the first thing that does not fit.
        """
        self.check_layout(world_size)
        parallel = self.parallel
        self.optimizer.check_layout(parallel)
        self.resolved_attention()
        self.resolved_transformer_impl()
        self.check_fp8()
        self.watch.check()
        for name, share in self.objective.cutting.items():
            if self.data.kind == "examples" and share > 0:
                raise ValueError(
                    f"objective.{name} is {share:g}, but must be 0 with data.kind examples: it would cut responses off "
                    "before their end"
                )
        interleaved = parallel.virtual_pipeline_model_parallel_size is not None
        self.training.check_batches(
            parallel.data_parallel_size(world_size), parallel.pipeline_model_parallel_size if interleaved else 1
        )
        if self.hang_timeout >= parallel.timeout_minutes * 60:
            raise ValueError(
                f"training.hang_timeout is {self.hang_timeout:g} s, but must be below parallel.timeout_minutes "
                f"{parallel.timeout_minutes:g}, after which collectives fail without naming who was missing"
            )

    def check_layout(self, world_size: int) -> None:
        """Check that model and samples divide over a job of `world_size` processes, whatever it is for.

        Raises:
            ValueError: naming the first thing that does not divide.
        """
        parallel = self.parallel
        parallel.data_parallel_size(world_size)
        self.model.check_layout(parallel)
        if self.model.log_snr_conditioning and not self.objective.gives_log_snr:
            raise ValueError(
                f"model.log_snr_conditioning is true, but objective {self.objective.name} has no noise levels to tell "
                "the model: set it false, or choose another objective"
            )
        pieces = 2 * parallel.context_parallel_size if parallel.context_parallel_size > 1 else 1
        if parallel.sequence_parallel:
            pieces *= parallel.tensor_model_parallel_size
        length = self.objective.model_length(self.data.sequence_length)
        if length % pieces:
            raise ValueError(
                f"the model's sequence length {length} (data.sequence_length {self.data.sequence_length} under "
                f"objective {self.objective.name}) is not a multiple of {pieces}, as "
                f"parallel.context_parallel_size {parallel.context_parallel_size} (two pieces per rank) and "
                f"parallel.sequence_parallel {parallel.sequence_parallel} ask for: change one of them"
            )

    def check_fp8(self) -> None:
        """Check that the products of the layers can be in FP8 where they are to be, on whatever machine.

        Raises:
            ValueError: naming the first thing that does not fit.
        """
        if self.fp8.param_gather and self.optimizer.optimizer_cpu_offload:
            raise ValueError(
                "fp8.param_gather is true, but parameters in FP8 are updated on the device and "
                "optimizer.optimizer_cpu_offload is on: set one of them false"
            )
        num_tokens = self.training.micro_batch_size * self.objective.model_length(self.data.sequence_length)
        self.fp8.check(self.training.precision, self.model, self.parallel, num_tokens=num_tokens)

    def resolved_attention(self) -> AttentionBackend:
        """Whose kernels compute attention in training on this machine; see `DenoiserConfig.resolved_attention`."""
        features = self.objective.mask_features(
            documents=self.data.reset_at_document or self.data.hides_padding, prompts=self.data.kind == "examples"
        )
        half_precision = self.training.parameter_precision == "bf16"
        return self.model.resolved_attention(self.parallel, mask_features=features, half_precision=half_precision)

    def resolved_transformer_impl(self) -> TransformerImpl:
        """Whose layers train on this machine; see `DenoiserConfig.resolved_transformer_impl`."""
        return self.model.resolved_transformer_impl(self.training.precision, self.fp8.recipe)

    @property
    def used_fp8(self) -> Fp8Config | None:
        """What the products of the layers are rounded to in training; None: nothing."""
        return self.fp8 if self.training.precision in ("fp8", "fp8-emulated") else None

    def flops_per_token(self, vocab_size: int) -> TokenFlops:
        """Operations of one token of a sample, forward and backward, at all positions that the model reads for it."""
        length = self.objective.model_length(self.data.sequence_length)
        return flops_per_token(self.model, vocab_size, length) * (length // self.data.sequence_length)

    @property
    def hang_timeout(self) -> float:
        """Seconds without progress after which a rank hangs."""
        given = self.training.hang_timeout
        return self.parallel.timeout_minutes * 60 / 2 if given is None else given

    def denoising_step(self, corpus: Corpus, groups: Groups) -> DenoisingStep:
        """What turns micro-batches of a corpus into losses and bounds in a job."""
        vocabulary = vocabulary_of(corpus.manifest)
        return DenoisingStep(
            objective=self.objective.build(vocabulary),
            groups=groups,
            vocab_size=vocabulary.size,
            mask_id=vocabulary.mask_id,
            token_bytes_V=corpus.token_bytes_V.to(groups.device),
            sequence_length=self.data.sequence_length,
            micro_batch_size=self.training.micro_batch_size,
            seed=self.training.seed,
            fused_head_loss=self.model.fused_head_loss,
            has_prompts=self.data.kind == "examples",
            hides_padding=self.data.hides_padding,
            document_end_id=corpus.manifest.eos_id if self.data.reset_at_document else None,
        )

    def to_yaml(self) -> str:
        """The resolved configuration as YAML."""
        return yaml.safe_dump(dataclasses.asdict(self), sort_keys=False)

    def differences(self, saved: dict[str, Any]) -> list[str]:
        """Settings that differ from those of a resolved configuration, one sentence each."""
        now = yaml.safe_load(self.to_yaml())
        return [
            f"{section}.{name} was {saved.get(section, {}).get(name)}, is {value}"
            for section, settings in now.items()
            for name, value in settings.items()
            if name in saved.get(section, {}) and saved[section][name] != value
        ]

    @classmethod
    def from_yaml(cls, path: Path) -> TrainConfig:
        """Read a resolved configuration.

        Raises:
            ValueError: unknown or refused settings.
        """
        sections = yaml.safe_load(path.read_text())
        settings = sections.pop("objective")
        objective = fields.from_mapping(objective_class(settings["name"]), settings, f"{path}.objective")
        return dataclasses.replace(fields.from_mapping(cls, sections, str(path)), objective=objective)

    def overridden(self, arguments: list[str]) -> TrainConfig:
        """Apply `--section.field value` arguments; `--objective NAME` first replaces the objective as a whole.

        Raises:
            ValueError: unknown options (with the nearest known one) or unreadable values.
        """
        values = fields.parse_flags(arguments)
        config = self
        if (name := values.pop("objective", None)) is not None:
            config = dataclasses.replace(config, objective=default_objective(name))
        return fields.override(config, values)


def objective_class(name: str) -> type[ObjectiveConfig]:
    """The settings of the objective of this name.

    Raises:
        ValueError: there is none.
    """
    if name not in OBJECTIVES:
        raise fields.unknown_name("objective", name, OBJECTIVES)
    return OBJECTIVES[name]


def default_objective(name: str) -> ObjectiveConfig:
    """The objective of this name with its default settings.

    Raises:
        ValueError: there is none.
    """
    make: Any = objective_class(name)  # its settings all have defaults
    return make()


def vocabulary_of(manifest: Any) -> Vocabulary:
    """The ids that objectives know by name, from the manifest of a corpus or of a checkpoint."""
    known = manifest if isinstance(manifest, dict) else dataclasses.asdict(manifest)
    ids = {name: known[name] for name in ("mask_id", "bos_id", "eos_id", "pad_id")}
    return Vocabulary(size=known["vocab_size"], **ids)


def load_recipe(path: Path) -> TrainConfig:
    """Run a recipe file and return its configuration.

    Raises:
        ValueError: no such file, or it does not define `config() -> TrainConfig`.
    """
    if not path.is_file():
        raise ValueError(
            f"no recipe {path}: expected a Python file such as examples/recipes/quickstart.py, before any settings"
        )
    spec = importlib.util.spec_from_file_location("megadiff_recipe", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses of a recipe look their annotations up there
    try:
        spec.loader.exec_module(module)
    except ImportError as error:
        raise ValueError(f"recipe {path} cannot be imported: {error}") from error
    build: Any = getattr(module, "config", None)
    config = build() if callable(build) else None
    if not isinstance(config, TrainConfig):
        raise ValueError(f"recipe {path} must define a function config() that returns a megadiff.config.TrainConfig")
    return config
