"""Files -> rows -> messages -> token ids and labels -> micro-batches.

In: what --dataset_name and --eval_dataset_name mean. Out: TokenRows of each part, a report on them, and the
collators that batch them.
Must not import: train, chat, merge. Rows stay on disk and are read one at a time.
Read: sources (what a name means) with local_files, readers (files), formats with layouts, turns, roles and
preferences (rows -> messages), scanning (one pass over a source), rows (who is trained, who is held out),
tokenizing (messages -> ids), packing (rows -> micro-batches), thoughts, report.
"""
