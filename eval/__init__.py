"""Measures of a run. `utils` first: it keeps quiet what other packages say while they are imported."""

import os
import sys

import utils  # noqa: F401

if not sys.stderr.isatty():  # a log wants figures, not the frames of progress bars
    os.environ.setdefault("TQDM_DISABLE", "1")
