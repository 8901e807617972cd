"""--do_predict: answers to the held-out rows, beside their references."""

import json
from pathlib import Path
from typing import Any

from utils.arguments import GenerationArguments
from utils.console import notice
from utils.formats import Chat
from utils.generation import generate_replies
from utils.run_record import next_free_path


def predict_rows(
    model: Any,
    tokenizer: Any,
    chats: list[Chat],
    stop_ids: list[int],
    generation_args: GenerationArguments,
    seed: int,
    batch_size: int,
    output_dir: Path,
) -> dict[str, int]:
    """Write {prompt, reference, prediction} of each row's last answer to predictions.jsonl."""
    asked = [chat.messages for chat in chats if len(chat.messages) > 1]
    asked = [messages for messages in asked if messages[-1]["role"] == "assistant"]
    replies = generate_replies(
        model, tokenizer, [messages[:-1] for messages in asked], stop_ids, generation_args, seed, batch_size
    )
    output_dir.mkdir(parents=True, exist_ok=True)
    path = next_free_path(output_dir / "predictions.jsonl")
    with open(path, "x", encoding="utf-8") as file:
        for messages, reply in zip(asked, replies, strict=True):
            question, reference = messages[-2]["content"], messages[-1]["content"]
            row = {"prompt": question, "reference": reference, "prediction": reply}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    notice(f"{len(replies)} predictions are in {path}")
    return {"predict_rows": len(replies)}
