"""parity.json of a GGUF file: does llama.cpp say what this chat says?

Both are asked the run's held-out questions. llama.cpp renders the template and tokenizes by itself, so the
file's tokenizer is part of what is compared. Ours computes in float32: in bfloat16 its own rounding, 0.05 and
more, would be most of the difference.
"""

import dataclasses
import gc
from pathlib import Path
from typing import Any

import numpy as np
import torch

from utils.arguments import DataArguments, GenerationArguments
from utils.chat.generation import BatchAnswerer, ChatModel, load_run
from utils.console import UserError, notice
from utils.data.rows import Rows
from utils.merge.held_out import read_questions
from utils.merge.parity import find_reference
from utils.models.folder import ResolvedModel
from utils.prompts.answer_spans import find_input_marker
from utils.prompts.messages import Messages
from utils.run.record import write_json

REPLY_TOKENS = 256
LIKELIEST = 10  # tokens whose log-probabilities are compared
LIMITS = {"first_token_difference": 0.05, "other_prompts": 0, "endless_replies": 0}


@dataclasses.dataclass(frozen=True)
class Answer:
    """What one program makes of a question; `reply` is empty where none was written."""

    prompt: list[int]
    log_probs: np.ndarray  # of the first token  # [vocabulary]
    reply: list[int]
    ended: bool


def certify(resolved: ResolvedModel, rows: tuple[Rows, DataArguments], file: Path, replies: int) -> bool:
    """Compare, write parity.json beside `file`, print the verdict; True where it is within LIMITS.

    So many `replies` are written by either; of all prompts the first token is compared.
    """
    chat = load_run(find_reference(resolved), torch.float32)
    questions = read_questions(rows[0], find_input_marker(chat.tokenizer.raw))
    if not questions:
        raise UserError("the held-out rows hold no question: --eval_dataset_name FILE names other ones")
    ours = answer_all(chat, questions, replies)
    del chat
    gc.collect()
    theirs = ask_llama_cpp(file, questions, replies)
    result = compare(ours, theirs)
    exceeded = {key: result[key] for key, limit in LIMITS.items() if not result[key] <= limit}
    verdict = {"verdict": "failed" if exceeded else "passed", "limits": LIMITS}
    about = {"adapter": resolved.args.checkpoint_dir, "base": resolved.args.base, "file": file.name}
    write_json(verdict | result | about, file.with_name("parity.json"))
    same = f"{result['identical_replies']} of {result['replies']} replies identical"
    notice(
        f"llama.cpp on {len(questions)} prompts: log-probabilities of the first token within "
        f"{result['first_token_difference']:.4f}, {result['other_prompts']} other prompts, "
        f"{same}, {result['endless_replies']} endless"
    )
    failed = ", ".join(f"{name} {value} (limit {LIMITS[name]})" for name, value in exceeded.items())
    notice(f"parity FAILED: {failed}" if exceeded else f"parity passed: {file.with_name('parity.json')}")
    return not exceeded


@torch.no_grad()
def answer_all(chat: ChatModel, questions: list[Messages], replies: int) -> list[Answer]:
    flags, answers = GenerationArguments(max_new_tokens=REPLY_TOKENS), []
    answerer = BatchAnswerer(chat.model, chat.tokenizer, flags, seed=0, batch_size=1)
    for number, question in enumerate(questions):
        prompt = chat.tokenizer.encode_prompt(question)
        logits = chat.model(input_ids=torch.tensor([prompt], device=chat.model.device)).logits[0, -1]
        reply = answerer.generate([prompt])[0] if number < replies else []
        ended = bool(reply) and reply[-1] in chat.tokenizer.stop_ids
        log_probs = logits.float().log_softmax(-1).cpu().numpy()
        answers.append(Answer(prompt, log_probs, reply[: len(reply) - ended], ended))
    return answers


def ask_llama_cpp(file: Path, questions: list[Messages], replies: int) -> list[Answer]:
    """The same of llama.cpp: prompts by the template and the tokenizer in the file, greedy replies."""
    from llama_cpp import Llama, llama_vocab_is_eog
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter

    model = Llama(str(file), n_ctx=0, n_threads=torch.get_num_threads(), verbose=False)
    vocabulary = model._model.vocab
    texts = {name: read_text(model, f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos")}
    formatter = Jinja2ChatFormatter(
        model.metadata["tokenizer.chat_template"], eos_token=texts["eos"], bos_token=texts["bos"]
    )
    answers = []
    for number, question in enumerate(questions):
        text = formatter(messages=question).prompt
        prompt = model.tokenize(text.encode(), add_bos=False, special=True)
        model.reset()
        model.eval(prompt)
        logits = np.ctypeslib.as_array(model._ctx.get_logits_ith(-1), shape=(model.n_vocab(),))
        log_probs = torch.from_numpy(logits.copy()).log_softmax(-1).numpy()
        reply: list[int] = []
        ended = False
        for token in model.generate(prompt, temp=0.0) if number < replies else ():
            ended = llama_vocab_is_eog(vocabulary, token)
            if ended or len(reply) == REPLY_TOKENS:
                break
            reply.append(token)
        answers.append(Answer(prompt, log_probs, reply, ended))
    return answers


def read_text(model: Any, field: str) -> str:
    """The token of an id among the file's fields, as text."""
    return model._model.token_get_text(int(model.metadata[field])) if field in model.metadata else ""


def compare(ours: list[Answer], theirs: list[Answer]) -> dict[str, Any]:
    differences, pairs = [], list(zip(ours, theirs, strict=True))
    for our, their in pairs:
        likeliest = np.argsort(our.log_probs)[-LIKELIEST:]
        differences.append(np.abs(our.log_probs - their.log_probs)[likeliest].max())
    return {
        "prompts": len(pairs),
        "replies": sum(bool(their.reply) for their in theirs),
        "first_token_difference": round(float(max(differences)), 5),
        "first_token_difference_mean": round(float(np.mean(differences)), 5),
        "other_prompts": sum(our.prompt != their.prompt for our, their in pairs),
        "identical_replies": sum(bool(our.reply) and our.reply == their.reply for our, their in pairs),
        "endless_replies": sum(our.ended and not their.ended for our, their in pairs),
        "ended_replies": sum(their.ended for their in theirs),
    }
