"""A run on disk -> replies: streamed, from a cache that is kept between turns, for one or several people.

In: a run's folder. Out: text, piece by piece.
Must not import: train, merge.
Read: generation (load_run, one reply), streaming, then page with page_replies, page_parts, page_messages,
page_labels and, in the browser, page.js; side_by_side is --compare; server with openai_form.
"""
