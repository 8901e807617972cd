"""The held-out rows of a run, read again as its run.json says."""

import dataclasses
from typing import Any

from eval.answers.questions import Question
from utils.arguments import DataArguments, ModelArguments, TrainingArguments
from utils.chat.generation import ChatModel
from utils.console import UserError
from utils.data.rows import count_trained_copies, find_held_out, load_rows
from utils.data.sources import find_sources
from utils.data.token_rows import Example
from utils.data.tokenizing import tokenize_rows
from utils.flags.checks import read_recorded_data
from utils.prompts.answer_spans import find_input_marker
from utils.prompts.messages import EVAL, TEST, TRAIN
from utils.prompts.rendering import split_thought
from utils.train.predictions import find_answered


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """`encoded` rows {input_ids, labels} for the loss; `questions` and their `references`; or why none."""

    encoded: list[Example]
    questions: list[Question]
    references: list[str]
    reason: str | None = None


def trains_on_all(data_args: DataArguments) -> bool:
    """Whether no file is for evaluation, by its flag or by its name."""
    sources = find_sources(data_args.dataset_name, data_args)
    return data_args.eval_dataset_name is None and all(source.part == TRAIN for source in sources)


def load_held_out(record: dict[str, Any] | None, chat: ChatModel, count: int) -> HeldOut:
    """The first `count` rows of the run's own split; none where its data is gone or has changed."""
    if record is None:
        return HeldOut(
            [], [], [], "There is no run.json, so the held-out rows are unknown: no held-out loss."
        )
    arguments = record["arguments"] | read_recorded_data(record)
    names = {field.name for field in dataclasses.fields(DataArguments)}
    data_args = DataArguments(**{name: value for name, value in arguments.items() if name in names})
    held_out = find_held_out(record)
    wanted = held_out or [EVAL]
    training_args = TrainingArguments(
        do_eval=EVAL in wanted, do_predict=TEST in wanted, data_seed=arguments["data_seed"]
    )
    try:
        if not held_out and trains_on_all(data_args):
            return HeldOut([], [], [], "The run held no rows out, it trained on all: no held-out loss.")
        rows = load_rows(ModelArguments(), data_args, training_args)
    except UserError as error:
        return HeldOut([], [], [], f"The run's data cannot be read ({error}): no held-out loss.")
    recorded = {source["sha256"] for source in record["data"]["sources"]}  # the files may have been moved
    changed = [one.name for one in rows.sources if one.digest not in recorded]
    if changed:
        return HeldOut([], [], [], f"{', '.join(changed)} has changed since the run: no held-out loss.")
    copies = count_trained_copies(record, rows)
    if copies:  # an older run, which trained on them
        reason = f"{copies:,} rows of the run's data hold the chat of a held-out row: no held-out loss."
        return HeldOut([], [], [], reason)
    as_trained = dataclasses.replace(chat.tokenizer, thinking=arguments.get("thinking", "auto"))
    parts = tokenize_rows(rows, as_trained, data_args)
    found = next((parts[part] for part in (EVAL, TEST) if len(parts[part])), parts[EVAL])
    encoded = [found[i] for i in range(min(count, len(found)))]
    chats = find_answered(rows.read_held_out(EVAL, find_input_marker(chat.tokenizer.raw))[:count])
    told = [chat.messages for chat in chats if not chat.tools]  # a question has no place for tools
    questions = [
        Question(f"held-out-{i}", messages[-2]["content"], "held out", messages[:-1])
        for i, messages in enumerate(told, 1)
    ]
    return HeldOut(encoded, questions, [split_thought(messages[-1])[1] for messages in told])
