"""lm-evaluation-harness around a run loaded by us: its 4-bit base, adapter, template and stop tokens."""

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from utils.console import UserError

OWN_TASKS = Path(__file__).parents[1] / "tasks"


def load_task_manager(tasks: list[str], include_path: str | None) -> Any:
    """lm_eval's index of tasks, ours and `include_path`'s among them. UserError for an unknown task."""
    from lm_eval.tasks import TaskManager

    folders = [str(OWN_TASKS), *([include_path] if include_path else [])]
    manager = TaskManager(include_path=folders, include_defaults=False)
    if any(task not in manager.all_tasks for task in tasks):  # indexing lm_eval's thousands takes a while
        manager = TaskManager(include_path=folders)
    unknown = [task for task in tasks if not manager.match_tasks([task])]
    if unknown:
        raise UserError(
            f"--tasks {','.join(unknown)}: no such task in lm_eval, eval/tasks"
            + (f" or {include_path}" if include_path else "; --include_path names a folder of your own")
        )
    return manager


def run_tasks(
    chat: Any,
    tasks: list[str],
    manager: Any,
    batch_size: int,
    num_fewshot: int | None = None,
    limit: int | None = None,
    chat_template: bool = False,
    seed: int = 42,
) -> dict[str, Any]:
    """lm_eval's results, samples included. Raises UserError where a task's data set cannot be had."""
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub.errors import OfflineModeIsEnabled
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of being given a loaded model
    chat.model.generation_config.eos_token_id = (
        chat.tokenizer.stop_ids
    )  # a template's stop need not be the eos
    raw = chat.tokenizer.raw
    lm = HFLM(pretrained=chat.model, tokenizer=raw, batch_size=batch_size, max_length=chat.context)
    if not sys.stderr.isatty():
        silence_bars(lm)
    try:
        return simple_evaluate(
            model=lm,
            tasks=tasks,
            task_manager=manager,
            num_fewshot=num_fewshot,
            limit=limit,
            apply_chat_template=chat_template,
            fewshot_as_multiturn=chat_template,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
            log_samples=True,
        )
    except (ConnectionError, OfflineModeIsEnabled, DatasetNotFoundError, FileNotFoundError) as error:
        raise UserError(
            f"--tasks {','.join(tasks)}: a data set cannot be had ({str(error).splitlines()[0]}); task files "
            "with local data work offline (--include_path, see eval/README.md)"
        ) from error


def silence_bars(lm: Any) -> None:
    """Switch off the bars of an HFLM: lm_eval sets `disable` of each itself, whatever TQDM_DISABLE says."""

    def silence(method: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: method(*args, **kwargs | {"disable_tqdm": True})

    for name in ("loglikelihood", "loglikelihood_rolling", "generate_until", "_loglikelihood_tokens"):
        setattr(lm, name, silence(getattr(lm, name)))


def read_scores(results: dict[str, Any]) -> list[dict[str, Any]]:
    """{task, metric, value, stderr} of every task and group, as lm_eval names them."""
    scores = []
    for task, values in results["results"].items():
        for key, value in values.items():
            metric, _, kind = key.partition(",")
            if isinstance(value, int | float) and kind and not metric.endswith("_stderr"):
                stderr = values.get(f"{metric}_stderr,{kind}")
                stderr = stderr if isinstance(stderr, int | float) else None
                scores.append({"task": task, "metric": metric, "value": value, "stderr": stderr})
    return scores
