"""An adapter merged into its base, tensor by tensor, and the certificate that the merged model says the same.

In: a run. Out: a standard model folder, or a GGUF file, with parity.json.
Must not import: train.
Read: weights (W + scale * B A, for each kind of layer), base_tensors, shards, parity; then gguf_file,
gguf_tokenizer, modelfile (Ollama's), gguf_parity. held_out: the rows that both are compared on.
"""
