"""What happens beside the steps: the progress line, sample answers, MMLU, ROUGE and BLEU, the curve."""

import json
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback

from utils.arguments import TrainingArguments
from utils.chat.generation import BatchAnswerer
from utils.console import is_main_process, notice
from utils.prompts.messages import Chat, Messages
from utils.train.mmlu import Question, evaluate_mmlu, find_letter_tokens
from utils.train.predictions import answer_chats, score_predictions

FEW_POINTS = 30  # of a curve whose points are marked


class ProgressLine(TrainerCallback):
    """A tqdm bar with loss, learning rate and real (unpadded) tokens/s."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            unit="step",
            dynamic_ncols=True,
            disable=not state.is_world_process_zero,
        )

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not hasattr(self, "bar"):
            return
        if "loss" in logs:
            self.bar.set_postfix_str(
                f"loss {logs['loss']:.3f}, lr {logs['learning_rate']:.1e}, "
                f"{logs['tokens_per_second']:,.0f} tokens/s"
            )
        elif "eval_loss" in logs:
            self.bar.write(f"step {state.global_step}: eval loss {logs['eval_loss']:.4f}")

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()
        del self.bar


class SampleAnswers(TrainerCallback):
    """Answers the same prompts before training, at each evaluation and at the end.

    Into samples.jsonl and on screen.
    """

    def __init__(self, answerer: BatchAnswerer, chats: list[Messages], output_dir: Path):
        self.answerer, self.chats, self.output_dir = answerer, chats, output_dir
        self.last_step = -1

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step == 0:
            self.write_answers(state.global_step)

    def on_evaluate(self, args, state, control, **kwargs):
        self.write_answers(state.global_step)

    def on_train_end(self, args, state, control, **kwargs):
        if not args.load_best_model_at_end:  # else what is kept has answered at its evaluation
            self.write_answers(state.global_step)

    def write_answers(self, step: int) -> None:
        if not is_main_process() or step == self.last_step:
            return
        self.last_step = step
        replies = self.answerer.answer(self.chats)
        self.output_dir.mkdir(parents=True, exist_ok=True)
        with open(self.output_dir / "samples.jsonl", "a", encoding="utf-8") as file:
            for chat, reply in zip(self.chats, replies, strict=True):
                prompt = chat[-1]["content"]
                file.write(
                    json.dumps({"step": step, "prompt": prompt, "reply": reply}, ensure_ascii=False) + "\n"
                )
                tqdm.write(f"step {step}: {prompt} -> {reply}")


class MmluEvaluation(TrainerCallback):
    """MMLU accuracy at each evaluation, logged with it (the QLoRA paper's MMLU callback)."""

    def __init__(self, tokenizer: Any, questions: list[Question], training_args: TrainingArguments):
        self.tokenizer, self.questions, self.training_args = tokenizer, questions, training_args
        tokens = ", ".join(f"{letter!r} {token}" for letter, token in find_letter_tokens(tokenizer).items())
        notice(f"MMLU: {len(questions)} questions, comparing the tokens {tokens}")

    def on_evaluate(self, args, state, control, metrics=None, model=None, **kwargs):
        metrics |= evaluate_mmlu(
            model,
            self.tokenizer,
            self.questions,
            self.training_args.mmlu_source_max_len,
            self.training_args.per_device_eval_batch_size,
        )
        accuracy = metrics["mmlu_accuracy"]
        notice(f"step {state.global_step}: MMLU {accuracy:.1%} over {len(self.questions)} questions")


class AnswerScores(TrainerCallback):
    """ROUGE and BLEU of answers to the held-out rows at each evaluation, logged with it."""

    def __init__(self, answerer: BatchAnswerer, chats: list[Chat]):
        self.answerer, self.chats = answerer, chats

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        answered = answer_chats(self.answerer, self.chats)
        scores = score_predictions(answered, "eval")
        metrics |= scores
        shown = ", ".join(f"{name.removeprefix('eval_')} {value:.1f}" for name, value in scores.items())
        notice(f"step {state.global_step}: {shown} over {len(answered)} answers")


def save_training_curve(log_history: list[dict[str, Any]], path: Path) -> None:
    """Loss over steps, with the held-out loss where it was measured."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), dpi=120, layout="tight")
    axes = figure.subplots()
    for key, label, style in (("loss", "training", "-"), ("eval_loss", "held out", "--")):
        points = [(entry["step"], entry[key]) for entry in log_history if key in entry]
        if points:
            marker = "o" if len(points) < FEW_POINTS else ""  # one point alone would be no line at all
            axes.plot(*zip(*points, strict=True), style, marker=marker, markersize=4, label=label)
    axes.set(xlabel="optimizer step", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    figure.savefig(path)
