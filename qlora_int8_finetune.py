"""Fine-tune a language model with LoRA on a frozen 8-bit base (LLM.int8(), arXiv 2208.07339).

python qlora_int8_finetune.py --model_name_or_path FOLDER_OR_HUB_ID --dataset_name FILE.jsonl --output_dir RUN
python cli_demo.py --checkpoint_dir RUN
"""

import sys
from pathlib import Path

from utils.arguments import (
    DataArguments,
    GenerationArguments,
    LoraArguments,
    ModelArguments,
    TrainingArguments,
)
from utils.console import run_main
from utils.data.rows import load_rows
from utils.data.sources import load_sample_prompts
from utils.flags.checks import check_arguments, resolve_adapter
from utils.flags.parser import find_given_flags, parse_args
from utils.run.record import collect_arguments, describe_finished
from utils.run.resume import check_same_data, find_earlier_run
from utils.run.signals import catch_stop_signals
from utils.train.mmlu import load_mmlu

FLAGS = [ModelArguments, DataArguments, LoraArguments, TrainingArguments, GenerationArguments]
DEFAULTS = {"bits": 8, "lora_r": 8, "lora_alpha": 16.0, "lora_dropout": 0.05, "model_max_length": 512}


def main() -> None:
    model_args, data_args, lora_args, training_args, generation_args = parse_args(
        sys.argv[1:], FLAGS, __doc__, **DEFAULTS
    )
    given = find_given_flags(sys.argv[1:])
    model_args, data_args, training_args = check_arguments(model_args, data_args, training_args, given)
    lora_args = resolve_adapter(lora_args, model_args, given)
    output_dir = Path(training_args.output_dir)
    arguments = collect_arguments(model_args, data_args, lora_args, training_args)
    earlier = None
    if training_args.do_train:
        earlier = find_earlier_run(output_dir, arguments, training_args.overwrite_output_dir)
        if earlier and earlier["status"] == "finished":
            return describe_finished(earlier, output_dir)
    rows = load_rows(model_args, data_args, training_args)  # bad files stop here, before torch is imported
    check_same_data(earlier, rows.describe(), training_args.force_resume)
    sample_chats = load_sample_prompts(training_args.sample_prompts) if training_args.sample_generate else []
    mmlu_questions = load_mmlu(training_args, data_args) if training_args.do_mmlu_eval else []

    from transformers import set_seed

    from utils.data.report import report_data
    from utils.data.tokenizing import tokenize_rows
    from utils.models.adapter import add_adapter, check_target_modules
    from utils.models.base import choose_compute_dtype, load_base
    from utils.models.tokenizer import load_stop_ids, load_tokenizer
    from utils.train.build import build_trainer
    from utils.train.training import build_callbacks, build_record, run_trainer

    check_target_modules(model_args, lora_args)
    tokenizer = load_tokenizer(model_args, data_args)
    stop_ids = load_stop_ids(model_args, tokenizer)
    datasets = tokenize_rows(rows, tokenizer, stop_ids, data_args)
    report_data(rows, datasets, tokenizer, model_args, data_args, training_args)
    if data_args.data_report:
        return

    dtype = choose_compute_dtype(model_args)
    set_seed(training_args.seed)  # before the adapter draws its first weights
    model = load_base(model_args, dtype)
    model = add_adapter(model, model_args, lora_args, trainable=training_args.do_train)

    record = build_record(model, tokenizer, stop_ids, rows, model_args, arguments)
    callbacks = build_callbacks(
        tokenizer, stop_ids, sample_chats, mmlu_questions, training_args, generation_args
    )
    trainer = build_trainer(
        model, tokenizer, datasets, model_args, data_args, training_args, dtype, record, callbacks
    )
    run_trainer(trainer, rows, stop_ids, training_args, generation_args)


if __name__ == "__main__":
    catch_stop_signals()
    run_main(main)
