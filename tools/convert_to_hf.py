"""Export a megadiff checkpoint to the Hugging Face format; the same as `megadiff convert`.

python tools/convert_to_hf.py RUN/checkpoints/step_00000400 exported/
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from megadiff.hf.convert import DTYPES, convert_to_hf


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code, 2 after a one-sentence error."""
    parser = argparse.ArgumentParser(description="Export a megadiff checkpoint to the Hugging Face format.")
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="a step_* directory or a run directory")
    parser.add_argument("output", type=Path, metavar="OUT", help="directory to make")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the exported weights")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it is an earlier export")
    arguments = parser.parse_args(argv)

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        convert_to_hf(arguments.checkpoint, arguments.output, dtype=arguments.dtype, overwrite=arguments.overwrite)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
