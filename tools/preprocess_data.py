"""Make a corpus from text: the same as `megadiff prepare`, for those who look for a script of this name.

python tools/preprocess_data.py --input my_texts/ notes.jsonl --output-dir data/mine --vocab-size 8192
"""

from __future__ import annotations

import sys

from megadiff.cli import main

# The guard matters: worker processes import this file again.
if __name__ == "__main__":
    raise SystemExit(main(["prepare", *sys.argv[1:]]))
