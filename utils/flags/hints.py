"""Flags of other trainers that people paste, and what says the same here: by meaning, not by spelling."""

from difflib import get_close_matches

CHECKPOINTING = "use --gradient_checkpointing True or False"
LENGTHS = "use --source_max_len and --target_max_len, or --model_max_length for their sum"
BATCH = "use --per_device_train_batch_size (and --gradient_accumulation_steps)"
RESUME = "the same command resumes by itself; --adapter_name_or_path starts from another run's adapter"
STOPPING = "use --early_stopping_patience, with --load_best_model_at_end and --eval_strategy steps"
FORMAT = "use --dataset_format, or nothing: the columns tell the format"
PRECISION = "use --bf16 or --fp16, or neither for the best the hardware has"
HINTS = {
    "resume": RESUME,
    "resume_training": RESUME,
    "checkpoint": "use --checkpoint_dir for an adapter to start from; the same command resumes a run",
    "lora_weights": "use --checkpoint_dir",
    "peft_path": "use --checkpoint_dir",
    "batch_size": BATCH,
    "micro_batch_size": BATCH,
    "train_batch_size": BATCH,
    "eval_batch_size": "use --per_device_eval_batch_size",
    "gradient_accumulation": "use --gradient_accumulation_steps",
    "grad_accum": "use --gradient_accumulation_steps",
    "epochs": "use --num_train_epochs",
    "num_epochs": "use --num_train_epochs",
    "steps": "use --max_steps",
    "lr": "use --learning_rate",
    "lr_scheduler": "use --lr_scheduler_type",
    "warmup": "use --warmup_steps, a count or a share below 1",
    "optimizer": "use --optim",
    "max_length": LENGTHS,
    "max_len": LENGTHS,
    "max_seq_len": LENGTHS,
    "max_seq_length": LENGTHS,
    "sequence_len": LENGTHS,
    "cutoff_len": LENGTHS,
    "block_size": LENGTHS,
    "model": "use --model_name_or_path",
    "model_path": "use --model_name_or_path",
    "base_model": "use --model_name_or_path",
    "model_id": "use --model_name_or_path",
    "model_id_or_path": "use --model_name_or_path",
    "output_path": "use --output_dir",
    "save_dir": "use --output_dir",
    "data": "use --dataset_name, which takes files, folders, hub ids and names",
    "train_file": "use --dataset_name",
    "train_data": "use --dataset_name",
    "dataset_path": "use --dataset_name",
    "dataset_dir": "name the files with --dataset_name; --data_dir holds local copies of the named sets",
    "validation_file": "use --eval_dataset_name",
    "eval_dataset": "use --eval_dataset_name",
    "val_size": "use --eval_dataset_size",
    "val_set_size": "use --eval_dataset_size",
    "max_samples": "use --max_train_samples, or #500 behind the file's name",
    "prompt_template_name": "use --template",
    "prompt_template": "use --template",
    "chat_template": "use --template, or nothing: the tokenizer's own is used",
    "conversation_template": "use --template",
    "data_format": FORMAT,
    "data_type": FORMAT,
    "load_in_4bit": "use --bits 4",
    "load_in_8bit": "use --bits 8",
    "quantization_bit": "use --bits",
    "quantization_method": "4 and 8 bits are bitsandbytes': use --bits and --quant_type",
    "bnb_4bit_quant_type": "use --quant_type",
    "bnb_4bit_compute_dtype": PRECISION,
    "use_double_quant": "use --double_quant",
    "bnb_4bit_use_double_quant": "use --double_quant",
    "torch_dtype": PRECISION,
    "dtype": PRECISION,
    "precision": PRECISION,
    "mixed_precision": PRECISION,
    "finetuning_type": "LoRA is trained by itself; --full_finetune with --bits 16 trains every weight",
    "train_type": "LoRA is trained by itself; --full_finetune with --bits 16 trains every weight",
    "stage": "fine-tuning on answers is all that is done here",
    "lora_rank": "use --lora_r",
    "rank": "use --lora_r",
    "alpha": "use --lora_alpha",
    "dropout": "use --lora_dropout",
    "lora_target": "use --lora_target_modules",
    "target_modules": "use --lora_target_modules",
    "lora_alpha_pattern": "one --lora_alpha holds for every layer",
    "lora_rank_pattern": "one --lora_r holds for every layer",
    "use_lora": "LoRA is trained by itself",
    "use_qlora": "use --bits 4, the default",
    "flash_attn": "packed attention is chosen by itself where the model allows it",
    "flash_attention": "packed attention is chosen by itself where the model allows it",
    "use_flash_attn": "packed attention is chosen by itself where the model allows it",
    "use_flash_attention": "packed attention is chosen by itself where the model allows it",
    "sample_packing": "use --packing True or False",
    "neat_packing": "use --packing, which keeps rows apart",
    "disable_gradient_checkpointing": CHECKPOINTING,
    "use_gradient_checkpointing": CHECKPOINTING,
    "early_stopping": STOPPING,
    "patience": STOPPING,
    "train_on_inputs": "use --train_on_source",
    "mask_history": "use --train_last_turn_only",
    "device": "use --use_cpu for the CPU; CUDA_VISIBLE_DEVICES chooses a GPU",
    "device_map": "layers are placed by themselves; CUDA_VISIBLE_DEVICES chooses the GPUs",
    "gpu": "CUDA_VISIBLE_DEVICES chooses a GPU",
    "wandb_project": "set the environment variable WANDB_PROJECT, and --report_to wandb",
    "use_wandb": "use --report_to wandb",
    "logger": "use --report_to",
    "max_tokens": "use --max_new_tokens",
    "max_gen_len": "use --max_new_tokens",
    "rep_penalty": "use --repetition_penalty",
    "port": "use --server_port on the page",
    "host": "use --server_name on the page",
    "plot_loss": "training_curve.png is drawn by itself",
    "merge_lora": "python -m utils.merge_adapter merges a run",
}
# Never proposed for a misspelling: these remove a run, run foreign code, or train on what was found wrong.
NEVER_PROPOSED = {
    "--overwrite_output_dir",
    "--force_resume",
    "--trust_remote_code",
    "--allow_pickle",
    "--ignore_data_report",
    "--push_to_hub",
    "--share",
}


def describe_unknown(word: str, flags: list[str]) -> str:
    """What to say of a word that no flag takes; `flags` are those of the running script."""
    if not word.startswith("-"):
        return f"unexpected word {word!r}: every value follows a --flag, a value with spaces goes in quotes"
    flag = word.split("=")[0]
    name = flag.lstrip("-").replace("-", "_")
    named = [part for part in HINTS.get(name, "").replace(",", " ").split() if part.startswith("--")]
    if name in HINTS and (not named or set(named) & set(flags)):
        return f"unknown flag {flag}: {HINTS[name]}"
    safe = [other for other in flags if other not in NEVER_PROPOSED]
    close = [other for other in safe if other.startswith(flag)] or get_close_matches(flag, safe, n=1)
    return f"unknown flag {flag}" + (
        f": did you mean {close[0]}? Flags are not abbreviated" if close else ": --help lists all flags"
    )
