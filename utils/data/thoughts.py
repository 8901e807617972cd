"""Rows with thoughts and rows without: which mode a run has, and what a mixture of them teaches.

    train: 1,000 rows, 30 with a thought in a trained answer, 970 without thoughts

A thinking model that sees this learns mostly to answer at once. Where its template has a switch, that is
bound to the prompt of thinking off, and thinking on suffers less; where it has none (DeepSeek-R1, gpt-oss),
both kinds follow the same prompt, and the model learns to think in 3% of its replies.
"""

from typing import Any

from utils.arguments import ModelArguments
from utils.data.token_rows import TokenRows
from utils.data.tokenizing import NO_THOUGHT, THOUGHT
from utils.models.tokenizer import ChatTokenizer
from utils.prompts.messages import TRAIN, Thinking
from utils.prompts.rendering import ThoughtStyle
from utils.run.record import find_run_record

FEW = 0.25  # a smaller share of one kind may be unlearnt


def count_thoughts(found: dict[str, Any]) -> tuple[int, int]:
    """(rows with a thought in a trained answer, rows without) of what was counted while tokenizing."""
    return found["counts"].get(THOUGHT, 0), found["counts"].get(NO_THOUGHT, 0)


def choose_thinking(
    tokenizer: ChatTokenizer, datasets: dict[str, TokenRows], model_args: ModelArguments
) -> ChatTokenizer:
    """The tokenizer in the mode of the run's replies: the flag's, else that of most training rows.

    Where nothing is trained it is what the run in --checkpoint_dir recorded.
    """
    if not tokenizer.style.is_thinking:
        return tokenizer
    mode: Thinking = model_args.thinking
    if mode == "auto" and any(count_thoughts(datasets[TRAIN].found)):
        with_thought, without = count_thoughts(datasets[TRAIN].found)
        mode = "on" if with_thought >= without else "off"
    elif mode == "auto" and model_args.checkpoint_dir:
        record = find_run_record(model_args.adapter_dir) or {}
        mode = (record.get("prompt") or {}).get("thinking") or "auto"
    return tokenizer.in_mode(mode)


def describe_thoughts(found: dict[str, Any], style: ThoughtStyle, mode: Thinking) -> list[str]:
    """What the report says of thoughts in the training rows: how they are trained, what may be unlearnt."""
    with_thought, without = count_thoughts(found)
    if not style.is_thinking:
        kept = f"the chat template knows no thoughts: {with_thought:,} rows train theirs as <think> text"
        return [f"{kept} (--thinking off leaves it out)"] if with_thought else []
    if not with_thought + without:
        return []
    share = with_thought / (with_thought + without)
    mixture = explain_mixture(share, style.has_switch)
    return [f"thinking {mode} in this run's replies", *([mixture] if mixture else [])]


def explain_mixture(share: float, has_switch: bool) -> str | None:
    """What a thinking model may unlearn where `share` of the rows have thoughts."""
    if not has_switch and share < 1:
        return (
            f"the chat template has no switch for thinking and {1 - share:.0%} of the rows have no thought: "
            "the model learns to leave it out as often; --thinking on trains the others alone"
        )
    if share == 0:
        return "no row has a thought: thinking on is not trained here, and may get worse"
    if share < FEW:
        return (
            f"only {share:.0%} of the rows have a thought: the model may stop thinking; add such rows, or "
            "choose one kind with --thinking on or off"
        )
    if 1 - FEW < share < 1:
        return (
            f"only {1 - share:.0%} of the rows have no thought: with thinking off the model may think all "
            "the same; add such rows, or choose one kind with --thinking on or off"
        )
    return None
