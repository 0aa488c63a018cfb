"""The subcommands of `megadiff`: each a few lines around the room that does the work, which it imports itself.

Every one takes its parsed arguments and the settings of the recipe that are to be replaced, and returns an exit code.
"""

from __future__ import annotations

import argparse
import dataclasses
import faulthandler
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megadiff import fields
from megadiff.arguments import from_arguments
from megadiff.console import rank, report
from megadiff.exit_codes import EXIT_DIFFERENT, EXIT_HUNG

if TYPE_CHECKING:
    from megadiff.config import TrainConfig

SECONDS_TO_LEAVE = 60.0


def train(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from megadiff.config import load_recipe
    from megadiff.data.corpus import Corpus
    from megadiff.parallel import groups as parallel_groups
    from megadiff.parallel.nodes import check_node
    from megadiff.training.loop import train
    from megadiff.training.rerun import SuspectResultError

    config = load_recipe(arguments.recipe).overridden(overrides)
    if arguments.help_config:
        print(fields.describe(config))
        return 0
    if arguments.run_dir is None:
        raise ValueError("train needs --run-dir DIR: where metrics and checkpoints go, and where a run is resumed from")
    world_size = parallel_groups.launched_world_size()
    config.check(world_size)
    check_node(config.parallel)
    if arguments.dry_run:
        Corpus.open(config.data.path)
        if rank() == 0:
            print(f"ready: {world_size} process(es) can train {arguments.recipe} in {arguments.run_dir}")
        return 0
    try:
        with parallel_groups.joined(config.parallel) as groups:
            train(config, arguments.run_dir, groups)
    except SuspectResultError as error:
        report(error)
        return error.exit_code
    # A stop by a signal is a success too: to launchers, a failing rank is a failing job.
    return 0


def _open_checkpoint(path: Path) -> tuple[Path, dict[str, Any], TrainConfig]:
    """The checkpoint that a path means, its manifest and the configuration it was trained with."""
    from megadiff.config import TrainConfig
    from megadiff.integrity import read_manifest
    from megadiff.training.checkpoint import find_checkpoint

    checkpoint = find_checkpoint(path)
    return checkpoint, read_manifest(checkpoint), TrainConfig.from_yaml(checkpoint / "config.yaml")


def evaluate(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from megadiff.data.corpus import Corpus
    from megadiff.evaluation.likelihood import estimate_nelbo
    from megadiff.parallel import groups as parallel_groups
    from megadiff.training.state import load_denoiser
    from megadiff.training.step import VALIDATION_SEED

    checkpoint, manifest, config = _open_checkpoint(arguments.checkpoint)
    # The layout is this job's, not the one that trained.
    config = dataclasses.replace(config, parallel=parallel_groups.ParallelConfig()).overridden(overrides)
    config.check_layout(parallel_groups.launched_world_size())
    corpus, length = Corpus.open(config.data.path), config.data.sequence_length
    if corpus.manifest.tokenizer_sha256 != manifest["tokenizer_sha256"]:
        raise ValueError(
            f"corpus {config.data.path} was encoded with another tokenizer than the checkpoint was trained on: "
            f"prepare it with --tokenizer {checkpoint / 'tokenizer.model'}"
        )
    with parallel_groups.joined(config.parallel) as groups:
        step = config.denoising_step(corpus, groups)
        weights = arguments.weights
        denoisers = load_denoiser(checkpoint, config.model, groups, sequence_length=length, weights=weights)
        loader = config.data.loader(corpus, "validation", VALIDATION_SEED)
        estimate = estimate_nelbo(step, denoisers, loader, config.validation.num_sequences)
        if groups.rank == 0:
            facts = {
                "checkpoint": str(checkpoint),
                "step": manifest["step"],
                "weights": weights,
                "split": "validation",
            }
            bounds = dataclasses.asdict(estimate) | {"ppl_bound": estimate.ppl_bound}
            text = {
                "unigram_entropy": corpus.manifest.unigram_entropy,
                "corpus_sha256": corpus.manifest.corpus_sha256,
                "corpus_python": corpus.manifest.python_version,
            }
            print(json.dumps(facts | bounds | text, indent=2))
    return 0


def generate(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from megadiff.config import vocabulary_of
    from megadiff.data.tokenizer import Tokenizer
    from megadiff.evaluation.generate import GenerateConfig, generate
    from megadiff.evaluation.trace import DenoisingTrace, pages
    from megadiff.models.whole import WholeDenoiser
    from megadiff.parallel import groups as parallel_groups
    from megadiff.training.sinks import TensorBoard
    from megadiff.training.state import load_denoiser

    if parallel_groups.launched_world_size() > 1:
        raise ValueError(
            "generate runs in one process, whatever layout trained the checkpoint: start it without torchrun"
        )
    checkpoint, manifest, config = _open_checkpoint(arguments.checkpoint)
    generation = from_arguments(GenerateConfig, arguments)
    tokenizer = Tokenizer.load(checkpoint / "tokenizer.model")
    trace = DenoisingTrace(tokenizer, generation.num_denoising_steps)

    def progress(calls: int, canvas_BL: Any) -> None:
        trace(calls, canvas_BL)
        if sys.stderr.isatty():
            print(f"\r{calls} calls of the denoiser", end="", file=sys.stderr)

    with parallel_groups.joined(parallel_groups.ParallelConfig()) as groups:
        denoisers = load_denoiser(
            checkpoint, config.model, groups, sequence_length=generation.length, weights=arguments.weights
        )
        texts = generate(
            generation,
            WholeDenoiser(denoisers, groups, manifest["vocab_size"]),
            config.objective,
            vocabulary_of(manifest),
            tokenizer,
            trained_on_prompts=config.data.kind == "examples",
            progress=progress,
        )
    if sys.stderr.isatty():
        print(file=sys.stderr)
    for text in texts:
        print(text)
    if arguments.tensorboard:
        page = TensorBoard(checkpoint.parent.parent)
        for name, markdown in pages(texts, trace).items():
            page.text(manifest["step"], name, markdown)
        page.close()
    return 0


def prepare(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from megadiff.data.preprocess import PrepareConfig, prepare

    prepare(from_arguments(PrepareConfig, arguments))
    return 0


def convert(arguments: argparse.Namespace, overrides: list[str]) -> int:
    if arguments.from_hf:
        from megadiff.importing import import_from_hf

        if (arguments.weights, arguments.dtype, arguments.overwrite) != ("model", "float32", False):
            raise ValueError("--weights, --dtype and --overwrite are for exports: leave them out with --from-hf")
        import_from_hf(arguments.checkpoint, arguments.output)
        return 0

    from megadiff.hf.convert import convert_to_hf

    convert_to_hf(
        arguments.checkpoint,
        arguments.output,
        weights=arguments.weights,
        dtype=arguments.dtype,
        overwrite=arguments.overwrite,
    )
    return 0


def compare(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from megadiff.training.compare import compare_runs

    comparison = compare_runs(arguments.run_a, arguments.run_b, tolerance=arguments.tolerance)
    print(comparison.description)
    return 0 if comparison.first_difference is None else EXIT_DIFFERENT


def parity(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from megadiff.config import load_recipe
    from megadiff.parallel import groups as parallel_groups
    from megadiff.parallel.nodes import check_node
    from megadiff.training.loop import train
    from megadiff.training.parity import compare_curves, runs_of_protocol

    runs = runs_of_protocol(load_recipe(arguments.recipe).overridden(overrides), control=arguments.control)
    for config in runs.values():
        config.check(parallel_groups.launched_world_size())
    check_node(config.parallel)
    for name, config in runs.items():
        with parallel_groups.joined(config.parallel) as groups:
            if not train(config, arguments.run_dir / name, groups):
                return 0  # asked to stop; the same command goes on
    reference, *others = (arguments.run_dir / name for name in runs)
    for candidate in others:
        parity = compare_curves(
            reference, candidate, band=arguments.band, window=arguments.window, first_step=arguments.first_step
        )
        if rank() == 0:
            print(f"{candidate.name} against {reference.name}\n\n{parity.table()}\n")
    return 0 if parity.holds else EXIT_DIFFERENT


def verify(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from megadiff.integrity import damage, has_checksums, read_manifest
    from megadiff.training.checkpoint import find_checkpoint, is_checkpoint, list_checkpoints

    path = arguments.checkpoint
    all_good = True
    for checkpoint in [path] if is_checkpoint(path) else list_checkpoints(path) or [find_checkpoint(path)]:
        try:
            manifest = read_manifest(checkpoint)
            problems = damage(checkpoint, manifest)
            good = "good" if has_checksums(manifest) else "no checksums: an older version wrote it"
        except ValueError as error:
            problems = [str(error)]
        all_good = all_good and not problems
        print(f"{checkpoint}: {'damaged: ' + ', '.join(problems) if problems else good}", flush=True)
    return 0 if all_good else EXIT_DIFFERENT


def preview(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from megadiff.config import load_recipe, vocabulary_of
    from megadiff.data.corpus import Corpus
    from megadiff.evaluation.preview import preview

    config = load_recipe(arguments.recipe).overridden(overrides)
    corpus = Corpus.open(config.data.path)
    loader = config.data.loader(corpus, "train", config.training.seed)
    fields.require(arguments.num_samples >= 1, "--num-samples", arguments.num_samples, "be at least 1")
    fields.require(arguments.first_sample >= 0, "--first-sample", arguments.first_sample, "be at least 0")
    process = config.objective.process(vocabulary_of(corpus.manifest))
    colour = sys.stdout.isatty() if arguments.colour == "auto" else arguments.colour == "always"
    batch = loader.batch(range(arguments.first_sample, arguments.first_sample + arguments.num_samples))
    seed = config.training.seed
    print(preview(batch.tokens_BL, batch.given_BL, batch.ordinal_B, process, corpus.tokenizer, seed, colour=colour))
    return 0


def plan(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from megadiff import plan_report, planning
    from megadiff.config import load_recipe
    from megadiff.data.corpus import Corpus
    from megadiff.dry_run import dry_run
    from megadiff.pace import H100_TFLOPS, pace

    config = load_recipe(arguments.recipe).overridden(overrides)
    fields.require(arguments.world_size >= 1, "--world-size", arguments.world_size, "be at least 1")
    vocab_size = arguments.vocab_size
    if vocab_size is None:
        if not Path(config.data.path).exists():
            raise ValueError(
                f"there is no corpus {config.data.path} that says how large the vocabulary is: give --vocab-size"
            )
        vocab_size = Corpus.open(config.data.path).manifest.vocab_size
    fields.require(vocab_size >= 2, "--vocab-size", vocab_size, "be at least 2: a token and the mask")
    if arguments.device_tflops is not None and arguments.mfu is None:
        raise ValueError("--device-tflops says nothing without a share of it: give --mfu, the utilisation to assume")
    plan = planning.plan(config, arguments.world_size, vocab_size)
    more: dict[str, Any] = {}
    if arguments.mfu is not None:
        tflops = H100_TFLOPS if arguments.device_tflops is None else arguments.device_tflops
        more["pace"] = pace(plan, arguments.world_size, mfu=arguments.mfu, device_tflops=tflops)
    if arguments.build:
        more["built"] = dry_run(config, arguments.world_size, vocab_size)
    if arguments.json:
        stages = [dataclasses.asdict(s) | {"peak": s.peak, "phase": s.phase} for s in plan.stages]
        flops = dataclasses.asdict(plan.flops_per_token) | {"total": plan.flops_per_token.total}
        found = dataclasses.asdict(plan) | {"flops_per_token": flops, "stages": stages}
        print(json.dumps(found | {name: dataclasses.asdict(part) for name, part in more.items()}, indent=2))
        return 0
    fits = plan.worst.peak <= arguments.device_memory_gib * planning.GIB
    help_with = [] if fits else plan_report.what_would_help(config, arguments.world_size, vocab_size)
    print(plan_report.describe(plan, arguments.device_memory_gib, help_with), *more.values(), sep="\n\n")
    return 0


def doctor(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from megadiff.doctor import check_health, check_live, check_loads
    from megadiff.doctor import report as findings
    from megadiff.preflight.check import check_cluster
    from megadiff.preflight.judge import PreflightConfig
    from megadiff.preflight.meeting import MeetingEndedError

    if arguments.cluster:
        try:
            is_good, verdict = check_cluster(from_arguments(PreflightConfig, arguments))
        except MeetingEndedError as error:
            report(error)
            # Groups that are left standing may wait for the rank that is gone: the interpreter's end has a deadline.
            faulthandler.dump_traceback_later(SECONDS_TO_LEAVE, exit=True, file=2)
            return EXIT_HUNG
        if verdict is not None:
            print(verdict, flush=True)
        return 0 if is_good else EXIT_DIFFERENT
    if given := {field.name for field in dataclasses.fields(PreflightConfig)} & set(vars(arguments)):
        raise ValueError(f"--{fields.flag(min(given))} is for the check of a cluster: give --cluster, too")
    if arguments.health is not None:
        check_health(arguments.health)
        return 0
    if arguments.require_library is not None:
        check_loads(arguments.require_library)
        return 0
    for name, finding in findings():
        print(f"{name:<33}{finding}")
    if arguments.require is not None:
        check_live(arguments.require)
    return 0
