"""Questions and answers as files: asked, generated, reviewed.

Out: rows in the QLoRA paper's layout. Read: questions, answering, reviews.
"""
