"""Flags of other trainers that people paste, and what says the same here: by meaning, not by spelling."""

from difflib import get_close_matches

# Our flag, and what other trainers call it.
SYNONYMS = {
    "checkpoint_dir": "lora_weights peft_path",
    "per_device_eval_batch_size": "eval_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation grad_accum",
    "num_train_epochs": "epochs num_epochs",
    "max_steps": "steps",
    "learning_rate": "lr",
    "lr_scheduler_type": "lr_scheduler",
    "optim": "optimizer",
    "model_name_or_path": "model model_path base_model model_id model_id_or_path",
    "output_dir": "output_path save_dir",
    "dataset_name": "train_file train_data dataset_path",
    "eval_dataset_name": "validation_file eval_dataset",
    "eval_dataset_size": "val_size val_set_size",
    "template": "prompt_template_name prompt_template conversation_template",
    "bits": "quantization_bit",
    "quant_type": "bnb_4bit_quant_type",
    "double_quant": "use_double_quant bnb_4bit_use_double_quant",
    "lora_r": "lora_rank rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "lora_target_modules": "lora_target target_modules",
    "train_on_source": "train_on_inputs",
    "train_last_turn_only": "mask_history",
    "report_to": "logger",
    "max_new_tokens": "max_tokens max_gen_len",
    "repetition_penalty": "rep_penalty",
}
# Words that no flag of ours stands for alone.
ADVICE = {
    "resume resume_training": (
        "the same command resumes by itself; --adapter_name_or_path starts from another run's adapter"
    ),
    "checkpoint": "use --checkpoint_dir for an adapter to start from; the same command resumes a run",
    "batch_size micro_batch_size train_batch_size": (
        "use --per_device_train_batch_size (and --gradient_accumulation_steps)"
    ),
    "warmup": "use --warmup_steps, a count or a share below 1",
    "max_length max_len max_seq_len max_seq_length sequence_len cutoff_len block_size": (
        "use --source_max_len and --target_max_len, or --model_max_length for their sum"
    ),
    "data": "use --dataset_name, which takes files, folders, hub ids and names",
    "dataset_dir": "name the files with --dataset_name; --data_dir holds local copies of the named sets",
    "max_samples": "use --max_train_samples, or #500 behind the file's name",
    "chat_template": "use --template, or nothing: the tokenizer's own is used",
    "data_format data_type": "use --dataset_format, or nothing: the columns tell the format",
    "load_in_4bit": "use --bits 4",
    "load_in_8bit": "use --bits 8",
    "quantization_method": "4 and 8 bits are bitsandbytes': use --bits and --quant_type",
    "bnb_4bit_compute_dtype torch_dtype dtype precision mixed_precision": (
        "use --bf16 or --fp16, or neither for the best the hardware has"
    ),
    "finetuning_type train_type": (
        "LoRA is trained by itself; --full_finetune with --bits 16 trains every weight"
    ),
    "stage": "fine-tuning on answers is all that is done here",
    "lora_alpha_pattern": "one --lora_alpha holds for every layer",
    "lora_rank_pattern": "one --lora_r holds for every layer",
    "use_lora": "LoRA is trained by itself",
    "use_qlora": "use --bits 4, the default",
    "flash_attn flash_attention use_flash_attn use_flash_attention": (
        "packed attention is chosen by itself where the model allows it"
    ),
    "sample_packing": "use --packing True or False",
    "neat_packing": "use --packing, which keeps rows apart",
    "disable_gradient_checkpointing use_gradient_checkpointing": "use --gradient_checkpointing True or False",
    "early_stopping patience": (
        "use --early_stopping_patience, with --load_best_model_at_end and --eval_strategy steps"
    ),
    "device": "use --use_cpu for the CPU; CUDA_VISIBLE_DEVICES chooses a GPU",
    "device_map": "layers are placed by themselves; CUDA_VISIBLE_DEVICES chooses the GPUs",
    "gpu": "CUDA_VISIBLE_DEVICES chooses a GPU",
    "wandb_project": "set the environment variable WANDB_PROJECT, and --report_to wandb",
    "use_wandb": "use --report_to wandb",
    "port": "use --server_port on the page",
    "host": "use --server_name on the page",
    "plot_loss": "training_curve.png is drawn by itself",
    "merge_lora": "python -m utils.merge_adapter merges a run",
}
HINTS = {word: f"use --{flag}" for flag, words in SYNONYMS.items() for word in words.split()}
HINTS |= {word: advice for words, advice in ADVICE.items() for word in words.split()}
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
