"""Training: transformers' Trainer with a loss by label tokens, exact resume, and what happens beside steps.

In: model, tokenizer, TokenRows. Out: a finished run in its folder.
Must not import: merge; nothing imports it but the fine-tune scripts and evaluation.
Read: trainer (a step, and its parts), engine (the gradient), token_loss, step_guard and meter (the parts),
resume_state (what a checkpoint holds), build (what is chosen), training (a run from start to end); then what
is asked beside the steps: probes, callbacks, mmlu, predictions; last summary and model_card.
"""
