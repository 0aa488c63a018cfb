"""The `megadiff` command line: what can be asked, and how it ends.

Errors that a user can cause are one sentence on stderr and exit code 2; torchrun's processes say them once.
"""

from __future__ import annotations

import argparse
import sys
import typing
from pathlib import Path
from typing import Any

from megadiff import __version__, commands
from megadiff.arguments import add_fields
from megadiff.console import report, setup_logging
from megadiff.exit_codes import EXIT_INTERRUPTED, EXIT_NO_DATA, EXIT_NON_FINITE, EXIT_USAGE
from megadiff.machine.compilation import bound_compile_workers


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
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)

    def command(name: str, run: Any, summary: str, epilog: str | None = None) -> argparse.ArgumentParser:
        sub = subparsers.add_parser(name, help=summary, description=summary, epilog=epilog, allow_abbrev=False)
        sub.set_defaults(run=run, takes_overrides=epilog is not None)
        return sub

    def add_weights(sub: argparse.ArgumentParser) -> None:
        average = "the trained weights, or their moving average (optimizer.ema_decay)"
        sub.add_argument("--weights", default="model", choices=("model", "ema"), help=average)

    settings = "Every setting of the recipe can be replaced: --section.field VALUE; --help-config lists them."

    sub = command("train", commands.train, "train a recipe, or go on where its run directory stopped", settings)
    sub.add_argument("recipe", type=Path, metavar="RECIPE.py")
    sub.add_argument("--run-dir", type=Path, metavar="DIR", help="metrics and checkpoints; an existing run is resumed")
    sub.add_argument("--help-config", action="store_true", help="list all settings, as they would be used, and stop")
    checked = "check recipe, settings, layout, devices and corpus for all processes of the job, and stop"
    sub.add_argument("--dry-run", action="store_true", help=checked)

    sub = command("evaluate", commands.evaluate, "estimate the bound of a checkpoint on held-out text", settings)
    sub.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="a step_* directory or a run directory")
    add_weights(sub)

    sub = command("generate", commands.generate, "write text with a checkpoint")
    sub.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="a step_* directory or a run directory")
    add_weights(sub)
    shown = "also show texts, and how the first came about, on the run's TensorBoard page"
    sub.add_argument("--tensorboard", action="store_true", help=shown)
    if requested == ["generate"]:
        from megadiff.evaluation.generate import GenerateConfig

        add_fields(sub, GenerateConfig)

    sub = command("prepare", commands.prepare, "turn text into a tokenizer and a training corpus")
    if requested == ["prepare"]:
        from megadiff.data.preprocess import PrepareConfig

        add_fields(sub, PrepareConfig)

    sub = command("convert", commands.convert, "export a checkpoint to Hugging Face format, or import a model from it")
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

    sub = command(
        "verify", commands.verify, "compare the files of checkpoints with their checksums; exit code 1 on damage"
    )
    sub.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="a step_* directory or a run: all that it has")

    sub = command("compare", commands.compare, "find the first step at which two runs differ")
    sub.add_argument("run_a", type=Path, metavar="RUN1")
    sub.add_argument("run_b", type=Path, metavar="RUN2")
    sub.add_argument(
        "--tolerance", type=float, default=0.0, help="relative difference that counts as equal (default: 0)"
    )

    sub = command("parity", commands.parity, "train a recipe in bf16 and in FP8, and compare the curves", settings)
    sub.add_argument("recipe", type=Path, metavar="RECIPE.py")
    sub.add_argument("--run-dir", type=Path, required=True, metavar="DIR", help="of both runs; resumed as by train")
    sub.add_argument(
        "--band", type=float, default=0.01, help="relative difference that counts as parity (default: 1 %%)"
    )
    sub.add_argument("--window", type=int, default=50, help="steps over which losses are averaged (default: 50)")
    sub.add_argument("--first-step", type=int, default=1, help="what comes before it is left out (default: 1)")
    halved = "also train in bf16 with micro-batches of half the size: what another rounding alone does"
    sub.add_argument("--control", action="store_true", help=halved)

    sub = command("preview", commands.preview, "show a real batch noised at five levels", settings)
    sub.add_argument("recipe", type=Path, metavar="RECIPE.py")
    sub.add_argument("--first-sample", type=int, default=0, help="its place in the training stream (default: 0)")
    sub.add_argument("--num-samples", type=int, default=2, help="samples of the batch (default: 2)")
    sub.add_argument("--colour", default="auto", choices=("auto", "always", "never"))

    sub = command(
        "plan", commands.plan, "predict parameters, operations and peak memory of a layout, without devices", settings
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

    sub = command("doctor", commands.doctor, "tell versions, devices and live kernels, or check the nodes of a job")
    sub.add_argument(
        "--cluster",
        action="store_true",
        help="under torchrun or srun: measure and compare all nodes, name what is wrong; exit code 1 if anything is",
    )
    sub.add_argument(
        "--require",
        choices=("cpu", "cuda"),
        help="fail unless there are devices of this kind and native kernels that run on them",
    )
    sub.add_argument(
        "--health",
        choices=("cpu", "cuda"),
        help="only fail unless there are such devices and their kernels load, without touching a GPU (for containers)",
    )
    sub.add_argument(
        "--require-library",
        choices=("cpu", "cuda"),
        help="only fail unless native kernels of this kind load; asks for no device (for builds of containers)",
    )
    if requested == ["doctor"]:
        from megadiff.preflight.judge import PreflightConfig

        add_fields(sub, PreflightConfig)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    setup_logging()
    bound_compile_workers()
    try:
        arguments, rest = _build_parser(argv[:1]).parse_known_args(argv)
        if rest and not arguments.takes_overrides:
            raise ValueError(f"unknown argument {rest[0]}; see `megadiff {arguments.command} --help`")
        return arguments.run(arguments, rest)
    except TimeoutError as error:
        report(error)
        # The loader's; a time-out of the operating system's has a number.
        return EXIT_NO_DATA if error.errno is None else EXIT_USAGE
    except (ValueError, OSError) as error:
        report(error)
        return EXIT_USAGE
    except FloatingPointError as error:
        report(error)
        return EXIT_NON_FINITE
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
