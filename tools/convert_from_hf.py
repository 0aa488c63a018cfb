"""Import a Hugging Face model: the same as `megadiff convert --from-hf`, for those who look for such a script.

python tools/convert_from_hf.py llama/ imported/
"""

from __future__ import annotations

import sys

from megadiff.cli import main

if __name__ == "__main__":
    raise SystemExit(main(["convert", "--from-hf", *sys.argv[1:]]))
