"""Folders and hub ids -> tokenizer, quantized base, adapter.

In: a model's name, a run, or an adapter folder. Out: a tokenizer with its template, and a model to train or
chat with.
Must not import: data, train, chat.
Read: folder (what is named, found from config.json alone), tokenizer, encoding (one tokenization of a
rendered chat), reply_text (a reply's thought in tags), base (4 bits), adapter (LoRA), sharded (a base that
processes share); baichuan and tokenizer_files for what transformers reads otherwise than it was made.
"""
