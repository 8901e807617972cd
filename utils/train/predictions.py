"""Answers to held-out rows, beside their references: --do_predict, and --predict_with_generate's scores."""

import json
from pathlib import Path

from accelerate.utils import gather_object

from utils.chat.generation import BatchAnswerer
from utils.console import is_main_process, notice, read_rank_and_size
from utils.prompts.messages import LEARNED, Chat
from utils.prompts.rendering import split_tags, split_thought
from utils.run.record import next_free_path
from utils.train.metrics import score_answers


def find_answered(chats: list[Chat]) -> list[Chat]:
    """Those whose last turn answers something, and is no mere context."""
    answered = [chat for chat in chats if len(chat.messages) > 1 and chat.messages[-1]["role"] == "assistant"]
    return [chat for chat in answered if chat.messages[-1].get(LEARNED, True)]


def answer_chats(answerer: BatchAnswerer, chats: list[Chat]) -> list[dict[str, str]]:
    """{prompt, reference, prediction} of each chat's last answer, without thoughts.

    Several processes share the chats.
    """
    rank, size = read_rank_and_size()
    mine = list(range(rank, len(chats), size))
    asked = [Chat(chats[i].messages[:-1], chats[i].tools) for i in mine]
    answered = dict(gather_object(list(zip(mine, answerer.answer(asked), strict=True))))
    return [
        {
            "prompt": chat.messages[-2]["content"],
            "reference": split_thought(chat.messages[-1])[1],
            "prediction": split_tags(answered[i])[1],
        }
        for i, chat in enumerate(chats)
    ]


def score_predictions(rows: list[dict[str, str]], prefix: str) -> dict[str, float]:
    """ROUGE and BLEU in percent, named `<prefix>_rouge-1` and so on."""
    if not rows:
        return {}
    scores = score_answers([row["prediction"] for row in rows], [row["reference"] for row in rows])
    return {f"{prefix}_{name}": value for name, value in scores.items()}


def predict_rows(answerer: BatchAnswerer, chats: list[Chat], output_dir: Path) -> dict[str, float]:
    """Write {prompt, reference, prediction} of each row's last answer to predictions.jsonl; score them."""
    answered = answer_chats(answerer, find_answered(chats))
    if is_main_process():
        output_dir.mkdir(parents=True, exist_ok=True)
        path = next_free_path(output_dir / "predictions.jsonl")
        with open(path, "x", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in answered)
        notice(f"{len(answered)} predictions are in {path}")
    return {"predict_rows": len(answered)} | score_predictions(answered, "predict")
