"""A run's held-out rows, read again as its run.json says: a merge is compared on them, a page offers them."""

import contextlib
import io

from utils.arguments import DataArguments, TrainingArguments
from utils.console import UserError
from utils.data.rows import Rows, find_held_out, load_rows
from utils.flags.checks import read_recorded_data
from utils.models.folder import ResolvedModel
from utils.prompts.answer_spans import answer_turns, find_input_marker
from utils.prompts.messages import EVAL, TEST, Messages

EXAMPLES, LONGEST_EXAMPLE = 4, 160  # questions, characters


def load_held_out_rows(resolved: ResolvedModel, name: str | None, count: int) -> tuple[Rows, DataArguments]:
    """The run's held-out rows, or those of the file or set `name`. Reads no weights."""
    record = resolved.record or {"arguments": {}}
    fields = read_recorded_data(record)
    if name is not None:
        fields |= {"dataset_name": name, "eval_dataset_name": name, "dataset_format": None}
    elif not fields:
        raise UserError(
            f"{resolved.args.checkpoint_dir} has no run.json and so no held-out rows: give "
            "--eval_dataset_name, or --parity False to merge unchecked"
        )
    data_args = DataArguments(**fields, max_eval_samples=count)
    training_args = TrainingArguments(do_eval=True, data_seed=record["arguments"].get("data_seed", 42))
    return load_rows(resolved.args, data_args, training_args), data_args


def read_questions(rows: Rows, marker: str) -> list[Messages]:
    """The chats of the held-out rows up to their last answer; those with tools are left out."""
    chats = next((found for part in (EVAL, TEST) if (found := rows.read_held_out(part, marker))), [])
    told = [one.messages for one in chats if not one.tools]
    return [messages[: answer_turns(messages)[-1]] for messages in told if answer_turns(messages)]


def find_examples(resolved: ResolvedModel, tokenizer: object) -> list[str]:
    """A few short questions of the rows that the run held out; none where it held none or they are gone."""
    if not find_held_out(resolved.record):
        return []
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # what the data is has been said by the run
            rows, _ = load_held_out_rows(resolved, None, 64)
    except UserError:
        return []
    questions = read_questions(rows, find_input_marker(tokenizer))
    texts = [messages[0]["content"] for messages in questions if len(messages) == 1]
    return [text for text in texts if len(text) <= LONGEST_EXAMPLE][:EXAMPLES]
