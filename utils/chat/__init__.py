"""A run on disk -> replies: streamed, for one person or several, by one decoder that they share.

In: a run's folder. Out: text, piece by piece.
Must not import: train, merge.
Read: generation (load_run), streaming (a reply's text), then page with page_replies, page_parts,
page_messages, page_labels and, in the browser, page.js; side_by_side is --compare; server with openai_form.
The decoder that replies share is decode/shared_decoder.
"""
