"""Messages -> text: chats, chat templates, and where in a text the answers stand.

In: a chat's messages and the tokenizer whose template renders them. Out: text, and the spans of its answers.
Must not import: run, fast, decode, models, data, train, chat. Training, chat and evaluation meet here.
Read: messages (what a chat is), rendering (messages -> text, thoughts included), answer_spans (what of it is
learned), templates/ (a template of ours each, chosen with --template).
"""
