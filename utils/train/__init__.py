"""Training: transformers' Trainer with a loss by label tokens, exact resume, and what happens beside steps.

In: model, tokenizer, TokenRows. Out: a finished run in its folder.
Must not import: merge; nothing imports it but the fine-tune scripts and evaluation.
Read: build (what is chosen), trainer (the loss), fast_trainer (the same on the fused path),
resumable_trainer and saving_trainer (a kill costs nothing), non_finite, callbacks, mmlu, predictions,
training (a run from start to end).
"""
