"""Train what a comparison table lacks and print it: ``python benchmarks/run_table.py --help``."""

from __future__ import annotations

import sys
from pathlib import Path

from distillzoo.bench.cli import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], teacher_folders=[Path(__file__).with_name("teachers")]))
