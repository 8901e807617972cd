"""Measures of a run. `utils` first: it keeps quiet what other packages say while they are imported."""

import utils  # noqa: F401
