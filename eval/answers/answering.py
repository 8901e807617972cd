"""Answers of a loaded model to questions, as rows of the QLoRA paper's format."""

from collections.abc import Iterator
from typing import Any

from eval.answers.questions import Question, name_answer
from utils.arguments import GenerationArguments
from utils.chat.generation import BatchAnswerer, ChatModel, build_generation_config, trim_history
from utils.prompts.rendering import MODES, render_chat, split_tags


def answer_questions(
    chat: ChatModel,
    questions: list[Question],
    generation_args: GenerationArguments,
    seed: int,
    batch_size: int,
    tuned: bool = True,
) -> Iterator[dict[str, Any]]:
    """{question_id, text, category, prompt, generation, answer_id, tokens, stopped, ids} of each question.

    A thought before the answer is `thought`. `ids` and their count `tokens` hold it and the stop token;
    `stopped` says whether the answer came to one.
    A chat too long for the context loses its oldest turns; a question too long by itself raises UserError.
    """
    chats = [
        trim_history(chat, question.messages, generation_args.max_new_tokens)[0] for question in questions
    ]
    prompts = [chat.tokenizer.encode_prompt(messages) for messages in chats]
    thinking = MODES[chat.tokenizer.thinking]
    replies = stream_replies(chat, prompts, generation_args, seed, batch_size, tuned)
    for question, messages, ids in zip(questions, chats, replies, strict=True):
        thought, text = split_tags(chat.tokenizer.decode_reply(ids))
        yield {
            "question_id": question.question_id,
            "text": question.text,
            "category": question.category,
            "prompt": render_chat(chat.tokenizer.raw, messages, True, thinking=thinking),
            "generation": text,
            "answer_id": name_answer(question.question_id, text),
            "tokens": len(ids),
            "stopped": bool(ids) and ids[-1] in chat.tokenizer.stop_ids,
            "ids": ids,
        } | ({"thought": thought} if thought else {})


def stream_replies(
    chat: ChatModel,
    prompts: list[list[int]],
    generation_args: GenerationArguments,
    seed: int,
    batch_size: int,
    tuned: bool,
) -> Iterator[list[int]]:
    """Token ids of one reply to each prompt, in order: `batch_size` under way at once.

    Where one step serves several replies the next one begins as soon as one has ended; the seed of a reply
    is then its own. Elsewhere batches are padded, which is faster than a token each in turn.
    """
    longest = max(map(len, prompts), default=0) + generation_args.max_new_tokens
    chat.decoder.open_slots(batch_size, longest, kept=0)
    if chat.decoder.shares_steps:
        config = build_generation_config(generation_args, chat.tokenizer)
        started = [chat.decoder.reply(prompt, config, tuned, seed + i) for i, prompt in enumerate(prompts)]
        yield from (list(reply.tokens()) for reply in started)
        return
    for start in range(0, len(prompts), batch_size):
        answerer = BatchAnswerer(chat.model, chat.tokenizer, generation_args, seed + start, batch_size)
        with chat.decoder.adapter.turned(tuned):
            replies = answerer.generate(prompts[start : start + batch_size])
        yield from replies
