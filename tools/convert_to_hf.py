"""Export a checkpoint to Hugging Face format: the same as `megadiff convert`, for those who look for such a script.

python tools/convert_to_hf.py RUN/checkpoints/step_00000400 exported/
"""

from __future__ import annotations

import sys

from megadiff.cli import main

if __name__ == "__main__":
    raise SystemExit(main(["convert", *sys.argv[1:]]))
