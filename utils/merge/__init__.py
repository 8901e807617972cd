"""An adapter merged into its base, tensor by tensor, and the certificate that the merged model says the same.

In: a run. Out: a standard model folder with parity.json.
Must not import: train.
Read: weights (W + scale * B A, for each kind of layer), base_tensors, shards, parity.
"""
