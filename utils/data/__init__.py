"""Files -> rows -> messages -> token ids and labels -> micro-batches.

In: what --dataset_name means. Out: TokenRows of each part, a report on them, and the collators that batch
them.
Must not import: train, chat, merge. Rows stay on disk and are read one at a time.
Read: sources (what a name means), readers (files), formats with layouts, roles and preferences (rows ->
messages), rows (who is trained, who is held out), tokenizing (messages -> ids), packing (rows -> micro-
batches), report.
"""
