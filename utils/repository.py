"""Where this repository lies: data, templates and models of its own are found from any folder."""

from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
