"""What several test modules use: no test module imports another, and no file here imports one."""

from pathlib import Path

ROOT = Path(__file__).parent.parent.parent  # the repository
IDENTITY = ROOT / "data" / "guanaco_identity.jsonl"  # 128 rows in two languages
SMOLLM2 = ROOT / "models" / "SmolLM2-135M-Instruct"
