"""Replies at the speed of memory: a token is one CUDA graph over 4-bit weights where they lie.

In: a model, with an adapter that is not merged, and a prompt's token ids. Out: token ids as they come, of one
conversation or of several at once. Where a model is not covered, one line says why and its own forward runs.
Must not import: models, data, train, chat.
Read: loop (a reply, a step a token), token_choice (which token), packed_product with cuda_c and cuda/ (the
product of a few tokens with packed weights), layers, attention, model (a whole step of 9 kernels a layer),
prompt_reader, setup and graph (what a model is covered by). Several at once: shared_decoder with reply, turns
(one after another), slots with batch_steps (one step for eight) and, for a CPU's server, shared_forward.
"""
