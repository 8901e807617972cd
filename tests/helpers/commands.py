"""Where commands are documented, and which flags each script parses."""

import importlib

from helpers import ROOT
from utils.flags.finetune import FLAGS

READMES = [ROOT / "README.md", ROOT / "README_zh.md"]
# Scripts that fine-tune nothing: the last of the groups that each parses.
OWN_GROUPS = {
    "cli_demo": "ChatArguments",
    "gradio_webserver": "PageArguments",
    "eval.lm_tasks": "TaskArguments",
    "eval.generate_answers": "AnswerArguments",
    "eval.quality": "QualityArguments",
    "eval.report": "ReportArguments",
    "eval.train_speed": "SpeedArguments",
    "eval.chat_speed": "ChatSpeedArguments",
    "eval.compare_runs": "CompareArguments",
    "utils.merge_adapter": "MergeArguments",
}


def find_flag_types(script):
    module = importlib.import_module(script)
    if script not in OWN_GROUPS:
        return FLAGS
    names = ["ModelArguments", "GenerationArguments", OWN_GROUPS[script]]
    return [getattr(module, name) for name in names if hasattr(module, name)]
