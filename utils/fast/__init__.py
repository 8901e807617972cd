"""The fused path: the loss and gradients of PEFT's own layers, in fewer kernels and without autograd between.

In: a model with LoRA. Out: forward and backward of a micro-batch on flat buffers, replayed as one CUDA
graph; replies a token at a time the same way. What is not covered takes the plain path; one line says why.
Must not import: models, data, train, chat.
Read: lora (the arithmetic), lora_layers (which layers take it), kernels and triton_kernels, keyed_noise
(dropout that follows from the row), loss, attention (rows packed end to end), model (all of it together),
graphed_step. Where memory is short: streamed_layers, host_embedding, fused_mlp. Several processes:
sharded_layers, sharded_vocabulary. For replies: packed_product and cuda/ (4-bit weights where they lie),
decode_layers, decode_model, prompt_reader, token_choice, decode_loop, graph_decode; for several at once
shared_decoder with reply, turns and slots.
"""
