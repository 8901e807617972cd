"""What eval.train_speed and eval.chat_speed time.

Read: shapes (models of random weights), workloads (rows), variants (the recipe of 2023, plain, fast),
steps, replies.
"""
