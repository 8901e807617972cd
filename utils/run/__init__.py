"""A run's folder: what made it, whole checkpoints, a lock, signals, and what must not have changed on resume.

In: arguments, fingerprints, states. Out: run.json and checkpoint-N, whole or not there.
Must not import: models, data, train, chat.
Read: run (the folder as one thing), record (run.json), resume (what must not change), keeper (who saves),
checkpoints (manifest, rename), training_state and optimizer_state, signals (stop between two steps), lock,
places (where a base is found again), repository.
"""
