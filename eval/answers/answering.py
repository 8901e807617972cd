"""Answers of a loaded model to questions, as rows of the QLoRA paper's format."""

from typing import Any

from eval.answers.questions import Question, name_answer
from utils.arguments import GenerationArguments
from utils.chat.generation import BatchAnswerer, ChatModel, trim_history
from utils.rendering import MODES, render_chat, split_tags


def answer_batch(
    chat: ChatModel,
    questions: list[Question],
    generation_args: GenerationArguments,
    seed: int,
    batch_size: int,
) -> list[dict[str, Any]]:
    """{question_id, text, category, prompt, generation, answer_id, tokens, stopped, ids} of each question.

    A thought before the answer is `thought`. `ids` and their count `tokens` hold it and the stop token;
    `stopped` says whether the answer came to one.
    A chat too long for the context loses its oldest turns; a question too long by itself raises UserError.
    """
    chats = [
        trim_history(chat, question.messages, generation_args.max_new_tokens)[0] for question in questions
    ]
    prompts = [chat.tokenizer.encode_prompt(messages) for messages in chats]
    answerer = BatchAnswerer(chat.model, chat.tokenizer, generation_args, seed, batch_size)
    rows, thinking = [], MODES[chat.tokenizer.thinking]
    for question, messages, ids in zip(questions, chats, answerer.generate(prompts), strict=True):
        thought, text = split_tags(chat.tokenizer.decode_reply(ids))
        rows.append(
            {
                "question_id": question.question_id,
                "text": question.text,
                "category": question.category,
                "prompt": render_chat(chat.tokenizer.raw, messages, True, thinking=thinking),
                "generation": text,
                "answer_id": name_answer(question.question_id, text),
                "tokens": len(ids),
                "stopped": bool(ids) and ids[-1] in chat.tokenizer.stop_ids,
                "ids": ids,
            }
            | ({"thought": thought} if thought else {})
        )
    return rows
