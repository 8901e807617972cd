"""The fused path: the loss and gradients of PEFT's own layers, in fewer kernels and without autograd between.

In: a model with LoRA. Out: forward and backward of a micro-batch on flat buffers, replayed as a CUDA graph;
and replies a token at a time. Where a model is not covered, one line says why and the plain path runs.
Must not import: models, data, train, chat.
Read: lora (the arithmetic), lora_layers (which take it), kernels, triton_kernels, keyed_noise (dropout that
follows from the row), loss, attention (rows end to end), model (all together), graphed_step. Short memory:
offload, streamed_layers, host_embedding, fused_mlp. Processes: sharded_layers, sharded_vocabulary. Replies:
packed_product, cuda/ (4-bit weights where they lie), decode_layers, decode_model, prompt_reader,
token_choice, decode_loop, graph_decode; several at once: shared_decoder.
"""
