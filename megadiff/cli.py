"""The `megadiff` command line: one function per subcommand, each a few lines around the room that does the work.

Errors that a user can cause are one sentence on stderr and exit code 2; torchrun's processes say them once.
"""

from __future__ import annotations

import argparse
import dataclasses
import faulthandler
import json
import logging
import os
import sys
import time
import typing
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megadiff import __version__, fields
from megadiff.exit_codes import EXIT_DIFFERENT, EXIT_HUNG, EXIT_INTERRUPTED, EXIT_NO_DATA, EXIT_NON_FINITE, EXIT_USAGE

if TYPE_CHECKING:
    from megadiff.config import TrainConfig

SECONDS_RANK_ZERO_HAS_TO_SPEAK = 5.0
SECONDS_TO_LEAVE = 60.0


def _rank() -> int:
    """As torchrun says, or srun."""
    return int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID", "0"))


def _setup_logging() -> None:
    """Our messages from rank 0, warnings from every rank, of the libraries below us errors only."""
    logging.basicConfig(
        level=logging.INFO if _rank() == 0 else logging.WARNING,
        format="%(asctime)s %(message)s",
        datefmt="%H:%M:%S",
        stream=sys.stderr,
        force=True,
    )
    for name in ("megatron", "torch", "tensorboard", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
        warnings.filterwarnings("ignore", module=name)


def _train(arguments: argparse.Namespace, overrides: list[str]) -> int:
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
        if _rank() == 0:
            print(f"ready: {world_size} process(es) can train {arguments.recipe} in {arguments.run_dir}")
        return 0
    try:
        with parallel_groups.joined(config.parallel) as groups:
            train(config, arguments.run_dir, groups)
    except SuspectResultError as error:
        _report(error)
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


def _evaluate(arguments: argparse.Namespace, overrides: list[str]) -> int:
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


def _generate(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from megadiff.config import vocabulary_of
    from megadiff.data.tokenizer import Tokenizer
    from megadiff.evaluation.generate import GenerateConfig, generate
    from megadiff.parallel import groups as parallel_groups
    from megadiff.training.state import load_denoiser

    if parallel_groups.launched_world_size() > 1:
        raise ValueError(
            "generate runs in one process, whatever layout trained the checkpoint: start it without torchrun"
        )
    checkpoint, manifest, config = _open_checkpoint(arguments.checkpoint)
    generation = _from_arguments(GenerateConfig, arguments)
    tokenizer = Tokenizer.load(checkpoint / "tokenizer.model")

    def progress(calls: int, _: Any) -> None:
        if sys.stderr.isatty():
            print(f"\r{calls} calls of the denoiser", end="", file=sys.stderr)

    with parallel_groups.joined(parallel_groups.ParallelConfig()) as groups:
        [denoiser] = load_denoiser(
            checkpoint, config.model, groups, sequence_length=generation.length, weights=arguments.weights
        )
        texts = generate(
            generation,
            denoiser,
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
    return 0


def _prepare(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from megadiff.data.preprocess import PrepareConfig, prepare

    prepare(_from_arguments(PrepareConfig, arguments))
    return 0


def _convert(arguments: argparse.Namespace, overrides: list[str]) -> int:
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


def _compare(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from megadiff.training.compare import compare_runs

    comparison = compare_runs(arguments.run_a, arguments.run_b, tolerance=arguments.tolerance)
    print(comparison.description)
    return 0 if comparison.first_difference is None else EXIT_DIFFERENT


def _verify(arguments: argparse.Namespace, overrides: list[str]) -> int:
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


def _preview(arguments: argparse.Namespace, overrides: list[str]) -> int:
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


def _plan(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from megadiff import planning
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
    help_with = [] if fits else planning.what_would_help(config, arguments.world_size, vocab_size)
    print(planning.describe(plan, arguments.device_memory_gib, help_with), *more.values(), sep="\n\n")
    return 0


def _doctor(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from megadiff.doctor import report
    from megadiff.preflight.check import check_cluster
    from megadiff.preflight.judge import PreflightConfig
    from megadiff.preflight.meeting import MeetingEndedError

    if arguments.cluster:
        try:
            is_good, verdict = check_cluster(_from_arguments(PreflightConfig, arguments))
        except MeetingEndedError as error:
            _report(error)
            # Groups that are left standing may wait for the rank that is gone: the interpreter's end has a deadline.
            faulthandler.dump_traceback_later(SECONDS_TO_LEAVE, exit=True, file=2)
            return EXIT_HUNG
        if verdict is not None:
            print(verdict, flush=True)
        return 0 if is_good else EXIT_DIFFERENT
    if given := {field.name for field in dataclasses.fields(PreflightConfig)} & set(vars(arguments)):
        raise ValueError(f"--{fields.flag(min(given))} is for the check of a cluster: give --cluster, too")
    for name, finding in report():
        print(f"{name:<32}{finding}")
    return 0


def _add_fields(parser: argparse.ArgumentParser, cls: type) -> None:
    """One flag per field of a configuration class, with its docstring as help."""
    docs, hints = fields.field_docs(cls), typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        is_tuple = typing.get_origin(hints[field.name]) is tuple
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        options: dict[str, Any] = {"nargs": "*"} if is_tuple else {}
        default = "" if required or field.default in (None, "", ()) else f" (default: {field.default})"
        parser.add_argument(
            f"--{fields.flag(field.name)}",
            required=required,
            default=argparse.SUPPRESS,
            metavar=field.name.rpartition("_")[2].upper(),
            help=docs.get(field.name, "").replace("%", "%%") + default,
            **options,
        )


def _from_arguments(cls: type, arguments: argparse.Namespace) -> Any:
    """Build a configuration class from the flags of `_add_fields`."""
    hints = typing.get_type_hints(cls)
    values = {}
    for field in dataclasses.fields(cls):
        if field.name not in arguments:
            continue
        given = getattr(arguments, field.name)
        name = f"--{fields.flag(field.name)}"
        values[field.name] = (
            tuple(given) if isinstance(given, list) else fields.parse_value(name, given, hints[field.name])
        )
    return cls(**values)


class _Parser(argparse.ArgumentParser):
    """Reports usage errors as every other error: one sentence, exit code 2."""

    def error(self, message: str) -> typing.NoReturn:
        raise ValueError(f"{message}; see `{self.prog} --help`")


def _build_parser(requested: list[str]) -> argparse.ArgumentParser:
    """The parser of all commands; only the requested one's settings are imported, so that help comes at once."""
    parser = _Parser(
        prog="megadiff",
        description="Pre-train discrete diffusion language models on Megatron-Core.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"megadiff {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)

    def command(name: str, run: Any, summary: str, epilog: str | None = None) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=summary, description=summary, epilog=epilog, allow_abbrev=False)
        sub.set_defaults(run=run, takes_overrides=epilog is not None)
        return sub

    def add_weights(sub: argparse.ArgumentParser) -> None:
        average = "the trained weights, or their moving average (optimizer.ema_decay)"
        sub.add_argument("--weights", default="model", choices=("model", "ema"), help=average)

    settings = "Every setting of the recipe can be replaced: --section.field VALUE; --help-config lists them."

    sub = command("train", _train, "train a recipe, or go on where its run directory stopped", settings)
    sub.add_argument("recipe", type=Path, metavar="RECIPE.py")
    sub.add_argument("--run-dir", type=Path, metavar="DIR", help="metrics and checkpoints; an existing run is resumed")
    sub.add_argument("--help-config", action="store_true", help="list all settings, as they would be used, and stop")
    checked = "check recipe, settings, layout, devices and corpus for all processes of the job, and stop"
    sub.add_argument("--dry-run", action="store_true", help=checked)

    sub = command("evaluate", _evaluate, "estimate the bound of a checkpoint on held-out text", settings)
    sub.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="a step_* directory or a run directory")
    add_weights(sub)

    sub = command("generate", _generate, "write text with a checkpoint")
    sub.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="a step_* directory or a run directory")
    add_weights(sub)
    if requested == ["generate"]:
        from megadiff.evaluation.generate import GenerateConfig

        _add_fields(sub, GenerateConfig)

    sub = command("prepare", _prepare, "turn text into a tokenizer and a training corpus")
    if requested == ["prepare"]:
        from megadiff.data.preprocess import PrepareConfig

        _add_fields(sub, PrepareConfig)

    sub = command("convert", _convert, "export a checkpoint to Hugging Face format, or import a model from it")
    sub.add_argument(
        "checkpoint",
        type=Path,
        metavar="SOURCE",
        help="a step_* directory or a run directory; with --from-hf a folder with config.json and tokenizer.model",
    )
    sub.add_argument("output", type=Path, metavar="OUT", help="a directory to make")
    sub.add_argument("--from-hf", action="store_true", help="import: SOURCE is in Hugging Face format, OUT a run")
    add_weights(sub)
    sub.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of the exported weights")
    sub.add_argument("--overwrite", action="store_true", help="replace OUT if it is an earlier export")

    sub = command("verify", _verify, "compare the files of checkpoints with their checksums; exit code 1 on damage")
    sub.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="a step_* directory or a run: all that it has")

    sub = command("compare", _compare, "find the first step at which two runs differ")
    sub.add_argument("run_a", type=Path, metavar="RUN1")
    sub.add_argument("run_b", type=Path, metavar="RUN2")
    sub.add_argument(
        "--tolerance", type=float, default=0.0, help="relative difference that counts as equal (default: 0)"
    )

    sub = command("preview", _preview, "show a real batch noised at five levels", settings)
    sub.add_argument("recipe", type=Path, metavar="RECIPE.py")
    sub.add_argument("--first-sample", type=int, default=0, help="its place in the training stream (default: 0)")
    sub.add_argument("--num-samples", type=int, default=2, help="samples of the batch (default: 2)")
    sub.add_argument("--colour", default="auto", choices=("auto", "always", "never"))

    sub = command(
        "plan", _plan, "predict parameters, operations and peak memory of a layout, without devices", settings
    )
    sub.add_argument("recipe", type=Path, metavar="RECIPE.py")
    sub.add_argument("--world-size", type=int, required=True, metavar="N", help="processes of the job")
    sub.add_argument("--vocab-size", type=int, metavar="V", help="ids, the mask's among them (default: the corpus's)")
    sub.add_argument(
        "--device-memory-gib", type=float, default=80.0, metavar="GIB", help="of one rank's device (default: 80)"
    )
    sub.add_argument(
        "--mfu", type=float, metavar="SHARE", help="utilisation to assume: also tell step time and days (0.4, say)"
    )
    sub.add_argument(
        "--device-tflops", type=float, metavar="N", help="peak of one device in bf16 (default: 989.4, an H100's)"
    )
    sub.add_argument(
        "--build", action="store_true", help="also build the modules of all kinds of ranks, without memory, and check"
    )
    sub.add_argument("--json", action="store_true", help="print bytes and counts for programs")

    sub = command("doctor", _doctor, "tell versions, devices and live kernels, or check the nodes of a job")
    sub.add_argument(
        "--cluster",
        action="store_true",
        help="under torchrun or srun: measure and compare all nodes, name what is wrong; exit code 1 if anything is",
    )
    if requested == ["doctor"]:
        from megadiff.preflight.judge import PreflightConfig

        _add_fields(sub, PreflightConfig)
    return parser


def _report(error: Exception) -> None:
    """Say an error once.

    Mostly all ranks meet the same one: rank 0 speaks, and the launcher ends the others while they wait. What only
    another rank has met is said by that rank.
    """
    if _rank() == 0:
        print(f"error: {error}", file=sys.stderr, flush=True)
    else:
        time.sleep(SECONDS_RANK_ZERO_HAS_TO_SPEAK)
        print(f"error on rank {_rank()}: {error}", file=sys.stderr, flush=True)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    _setup_logging()
    try:
        arguments, rest = _build_parser(argv[:1]).parse_known_args(argv)
        if rest and not arguments.takes_overrides:
            raise ValueError(f"unknown argument {rest[0]}; see `megadiff {arguments.command} --help`")
        return arguments.run(arguments, rest)
    except TimeoutError as error:
        _report(error)
        # The loader's; a time-out of the operating system's has a number.
        return EXIT_NO_DATA if error.errno is None else EXIT_USAGE
    except (ValueError, OSError) as error:
        _report(error)
        return EXIT_USAGE
    except FloatingPointError as error:
        _report(error)
        return EXIT_NON_FINITE
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
