"""The fused path: the loss and gradients of PEFT's own layers, in fewer kernels and without autograd between.

In: a model with LoRA. Out: forward and backward of a micro-batch on flat buffers, replayed as a CUDA graph.
Where a model is not covered, one line says why and the plain path runs.
Must not import: models, data, train, chat.
Read: lora (the arithmetic), lora_layers (which layers take it), kernels and triton_kernels, keyed_noise
(dropout that follows from the row), fused_norm, fused_rotation, loss, attention (rows packed end to end),
model (all of it together), graphed_step, compiling. Where memory is short: rehearsal, offload,
streamed_layers, host_embedding, fused_mlp. Several processes: sharded_layers, sharded_vocabulary.
"""
