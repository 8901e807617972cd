"""Fine-tune a language model with LoRA on a frozen 8-bit base (LLM.int8(), arXiv 2208.07339).

python qlora_int8_finetune.py --model_name_or_path FOLDER_OR_HUB_ID --dataset_name FILE.jsonl --output_dir RUN
python cli_demo.py --checkpoint_dir RUN
"""

import sys

from utils.console import run_main
from utils.data.rows import load_rows
from utils.flags.finetune import parse_finetune_flags
from utils.run.run import open_run
from utils.run.signals import catch_stop_signals
from utils.train.probes import load_probes

DEFAULTS = {"bits": 8, "lora_r": 8, "lora_alpha": 16.0, "lora_dropout": 0.05, "model_max_length": 512}


def main() -> None:
    # Flags, folders and files first: a mistake ends here, in seconds and in one line.
    model_args, data_args, lora_args, training_args, generation_args = parse_finetune_flags(
        sys.argv[1:], __doc__, **DEFAULTS
    )
    run = open_run(model_args, data_args, lora_args, training_args)  # a new one, or that of --output_dir
    if run.is_finished:
        return run.print_finished()
    rows = load_rows(model_args, data_args, training_args)  # checked and split, still on disk
    run.describe(data=rows.describe())  # into run.json; an earlier start must have had the same
    probes = load_probes(training_args, data_args)  # sample prompts and MMLU, asked at each evaluation

    # From here on torch is imported (seconds) and weights are loaded (minutes).
    from utils.data.report import report_data
    from utils.data.thoughts import choose_thinking
    from utils.data.tokenizing import tokenize_rows
    from utils.fast.compiling import start_compiling
    from utils.models.adapter import check_target_modules, load_model
    from utils.models.tokenizer import load_chat_tokenizer
    from utils.train.build import build_trainer
    from utils.train.dry_run import needs_streaming, print_plan
    from utils.train.training import run_trainer

    check_target_modules(model_args, lora_args)
    tokenizer = load_chat_tokenizer(model_args, data_args)  # with its template and stop tokens
    datasets = tokenize_rows(rows, tokenizer, data_args)
    tokenizer = choose_thinking(tokenizer, datasets, model_args)  # the mode of its replies
    report_data(rows, datasets, tokenizer, model_args, data_args, training_args)  # a red one ends here
    if data_args.data_report:
        return

    if training_args.dry_run:
        return print_plan(datasets, model_args, data_args, lora_args, training_args)

    streams = needs_streaming(datasets, model_args, data_args, lora_args, training_args)
    start_compiling()  # the GPU's kernels, while the weights load
    model, dtype = load_model(model_args, lora_args, training_args, streams)
    run.describe_model(model.config, tokenizer.describe())
    trainer = build_trainer(
        model, tokenizer, datasets, run, model_args, data_args, lora_args, training_args, dtype
    )
    run_trainer(trainer, run, rows, probes, tokenizer, training_args, generation_args)
    trainer.accelerator.end_training()  # several processes take leave of each other


if __name__ == "__main__":
    catch_stop_signals()
    run_main(main)
