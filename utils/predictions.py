"""--do_predict: answers to the held-out rows, beside their references."""

import json
from pathlib import Path
from typing import Any

from utils.arguments import GenerationArguments
from utils.console import notice
from utils.generation import generate_replies
from utils.prompts import row_to_messages
from utils.run_record import next_free_path


def predict_rows(
    model: Any,
    tokenizer: Any,
    rows: list[dict[str, Any]],
    dataset_format: str,
    stop_ids: list[int],
    generation_args: GenerationArguments,
    seed: int,
    batch_size: int,
    output_dir: Path,
) -> dict[str, int]:
    """Write {prompt, reference, prediction} of each row's last answer to predictions.jsonl."""
    alpaca_input = "### Input:" in tokenizer.chat_template
    chats = [row_to_messages(row, dataset_format, alpaca_input) for row in rows]
    chats = [chat for chat in chats if chat[-1]["role"] == "assistant" and len(chat) > 1]
    replies = generate_replies(
        model, tokenizer, [chat[:-1] for chat in chats], stop_ids, generation_args, seed, batch_size
    )
    output_dir.mkdir(parents=True, exist_ok=True)
    path = next_free_path(output_dir / "predictions.jsonl")
    with open(path, "x", encoding="utf-8") as file:
        for chat, reply in zip(chats, replies, strict=True):
            row = {"prompt": chat[-2]["content"], "reference": chat[-1]["content"], "prediction": reply}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    notice(f"{len(replies)} predictions are in {path}")
    return {"predict_rows": len(replies)}
