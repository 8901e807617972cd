"""Messages -> text, and where the answers stand in it. The one place where text becomes a prompt.

A chat template is a small program that the tokenizer brings along. The one named vicuna makes of

    [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4."}]

    A chat between a curious user and ... questions. USER: 2 + 2? ASSISTANT: 4.</s>
                                                                            ^^^^^^^ learned

Labels come from rendering, never from searching for token ids: the prompt of assistant turn i is the chat
before it, rendered with the generation prompt ("ASSISTANT:"), and what rendering the turn appends to that is
what is learned. So the same code tells training what to learn and chat where to begin, for every template.
"""

import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from utils.console import UserError
from utils.prompts.messages import LEARNED, TEXT_ROLE, Chat, Messages
from utils.prompts.rendering import find_style, has_thought, render_chat, split_thought, write_reply

TEMPLATES_DIR = Path(__file__).parent / "templates"
TOOLS_CURE = (
    "(those of Qwen2.5, Qwen3 and Llama 3.1 show them; where <|im_end|> is a token, --template chatml does)"
)
# render_chat of a tokenizer: (messages, whether a generation prompt follows, whether with thinking) -> text
Render = functools.partial[str]
Span = tuple[int, int]  # characters [start, end) of a rendered text


def template_names() -> list[str]:
    return sorted(path.stem for path in TEMPLATES_DIR.glob("*.jinja"))


def read_template(name: str) -> str:
    """Source of utils/prompts/templates/NAME.jinja. Raises UserError for an unknown name."""
    if name not in template_names():
        raise UserError(f"--template {name}: no such template; use one of {', '.join(template_names())}")
    return (TEMPLATES_DIR / f"{name}.jinja").read_text(encoding="utf-8")


def find_input_marker(tokenizer: Any) -> str:
    """What goes between a question and its input: Stanford's heading where the template looks for it."""
    return "\n\n### Input:\n" if "### Input:" in tokenizer.chat_template else "\n\n"


@dataclass(frozen=True)
class RenderedRow:
    """A chat as text, and where its answers are: characters [start, end) of each.

    An answer begins with the blanks that end its prompt and ends with its stop token. `trained`: those of the
    `answers` that are learned. `turn_by_turn`: the template rewrites earlier answers, so that each answer has
    a row of its own and the earlier ones are part of its prompt. `never`: answers that the data marks as
    context, and a whole prompt that hides such a one; no flag has them learned.
    """

    messages: Messages
    text: str
    answers: list[Span]
    trained: list[Span]
    turn_by_turn: bool = False
    never: list[Span] = field(default_factory=list)


def find_border(prompt: str) -> int:
    """Where the answer to `prompt` begins: before the blanks that end it.

    A blank and the word behind it are one token to most tokenizers, so it is the answer's. The border depends
    on the template alone, never on the answer: when a reply is generated there is none yet.
    """
    return len(prompt.rstrip(" "))


def split_prompt(
    render: Render, messages: Messages, stops: list[str], thinking: bool | None = None
) -> tuple[str, list[Span]]:
    """The text of a chat that ends before an assistant turn, and where its earlier answers are.

    None are found where the template rewrites earlier answers (Qwen3, gpt-oss, DeepSeek-R1 drop thoughts).
    """
    prompt, answers = render(messages, True, thinking=thinking), []
    for turn in answer_turns(messages):
        before, answer = render_turn(render, messages, turn, stops)
        if not prompt.startswith(before + answer):
            return prompt, []
        answers.append((find_border(before), len(before) + len(answer)))
    return prompt, answers


def split_chat(tokenizer: Any, chat: Chat, stops: list[str], last_only: bool = False) -> list[RenderedRow]:
    """The training rows of one chat: one, or one for each answer where the template rewrites earlier ones.

    `last_only`: earlier answers are not trained.
    """
    messages = chat.messages
    if messages[0]["role"] == TEXT_ROLE:
        text = messages[0]["content"] + tokenizer.eos_token
        return [RenderedRow(messages, text, [(0, len(text))], [(0, len(text))])]
    check_tools(tokenizer, chat)
    render = functools.partial(render_chat, tokenizer, tools=chat.tools)
    turns = answer_turns(messages)
    learned = [turn for turn in turns if messages[turn].get(LEARNED, True)]
    if learned:  # an answer behind the last one that is learned is nobody's context
        messages = messages[: learned[-1] + 1]
        turns = answer_turns(messages)
    rows: list[RenderedRow] = []
    while turns:
        *earlier, last = turns
        thinks = has_thought(messages[last])
        if thinks and not split_thought(messages[last])[1].strip() and not messages[last].get("tool_calls"):
            raise UserError("an answer is a thought alone, or one without an end")
        prompt, answers = split_prompt(render, messages[:last], stops, thinks)
        text = prompt + render_turn(render, messages, last, stops, prompt)[1]
        rewritten = bool(earlier) and not answers
        answers = [*answers, (find_border(prompt), len(text))]
        spoken = turns[-len(answers) :]  # the turns of these answers: all, or the last one alone
        trained = [
            span for turn, span in zip(spoken, answers, strict=True) if messages[turn].get(LEARNED, True)
        ]
        never = [span for span in answers if span not in trained]
        hidden = [message for turn, message in enumerate(messages[:last]) if turn not in spoken]
        if not all(message.get(LEARNED, True) for message in hidden):
            never.append((0, answers[0][0]))
        if last_only:
            trained = [span for span in trained if span == answers[-1]]
        if trained:
            by_turn = rewritten or bool(rows)
            rows.insert(0, RenderedRow(messages[: last + 1], text, answers, trained, by_turn, never))
        turns = earlier if rewritten and not last_only else []
    return rows


def check_tools(tokenizer: Any, chat: Chat) -> None:
    """Raise UserError where the template drops the chat's tools, a call or a result without a word.

    It does where the same text comes out without them: a call would be trained as an empty answer. So would
    one that does not begin with the generation prompt (see render_turn).
    """
    messages, render = chat.messages, functools.partial(render_chat, tokenizer, tools=chat.tools)
    if chat.tools and render(messages, False) == render_chat(tokenizer, messages):
        raise UserError(f"the chat template leaves out the tools {TOOLS_CURE}")
    for i, message in enumerate(messages):
        if message.get("tool_calls"):
            silent = {name: value for name, value in message.items() if name != "tool_calls"}
            if is_same(render, messages[:i], message, silent):
                raise UserError(f"the chat template leaves out tool calls {TOOLS_CURE}")
            thinks = has_thought(message)
            called = render(messages[: i + 1], False, thinking=thinks)
            if not called.startswith(render(messages[:i], True, thinking=thinks)):
                raise UserError(
                    "the chat template's generation prompt opens a thought, its tool calls have none"
                )
        elif message["role"] == "tool" and message["content"]:
            if is_same(render, messages[:i], message, message | {"content": ""}):
                raise UserError(f"the chat template leaves out the results of tools {TOOLS_CURE}")


def is_same(render: Render, before: Messages, message: dict[str, Any], silent: dict[str, Any]) -> bool:
    """Whether both messages come out alike; a template that refuses the silent one tells them apart."""
    text = render([*before, message], False)
    try:
        return text == render([*before, silent], False)
    except UserError:
        return False


def answer_turns(messages: Messages) -> list[int]:
    """Indices of the assistant turns that answer something; a leading assistant turn is no answer."""
    asking = (i for i, message in enumerate(messages) if message["role"] not in ("system", "assistant"))
    asked = next(asking, len(messages))
    return [i for i, message in enumerate(messages) if message["role"] == "assistant" and i > asked]


def render_turn(
    render: Render, messages: Messages, turn: int, stops: list[str], prompt: str | None = None
) -> tuple[str, str]:
    """(prompt, answer) of one assistant turn; the answer ends with its stop token, rendered or appended.

    With a thought it is a reply of thinking on, without one of thinking off, whose prompt may hold an empty
    thought (Qwen3): that is no label.
    """
    thought, said = split_thought(messages[turn])
    prompt = render(messages[:turn], True, thinking=bool(thought)) if prompt is None else prompt
    whole = render(messages[: turn + 1], False, thinking=bool(thought))
    is_shown = whole.startswith(prompt) and thought in whole[len(prompt) :]
    rest = whole[len(prompt) :]
    if not is_shown:
        rest = write_reply(find_style(render.args[0]), prompt, thought, said.strip())
    ends = [rest.find(stop) + len(stop) for stop in stops if stop in rest]
    return prompt, rest[: min(ends)] if ends else rest + find_closing(render, messages[: turn + 1], stops)


def find_closing(render: Render, messages: Messages, stops: list[str]) -> str:
    """The stop token behind an answer that its template leaves open: what opens the turn that follows it.

    That is another one behind a tool call than behind words (GLM: <|observation|> and <|user|>).
    """
    behind = render_result(render, messages) if messages[-1].get("tool_calls") else ""
    return next((stop for stop in stops if behind.lstrip().startswith(stop)), stops[0])


def render_result(render: Render, messages: Messages) -> str:
    """What the template puts behind messages that end with a call where the tool's result follows."""
    text = render(messages, False)
    whole = render([*messages, {"role": "tool", "content": "Probe"}], False)
    return whole[len(text) :] if whole.startswith(text) else ""


def has_inner_stop(messages: Messages, stops: list[str]) -> bool:
    """Whether a stop token stands in the middle of an answer's own text: what follows it is not trained."""
    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    return any(answer.partition(stop)[2].strip() for answer in answers for stop in stops)


def find_stop_tokens(tokenizer: Any, eos_token_ids: list[int]) -> list[int]:
    """Ids that end a reply; the first is what closes an answer in the template, or follows it (GLM)."""
    probe = "Probe"
    question, answer = {"role": "user", "content": "Question"}, {"role": "assistant", "content": probe}
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)

    def find_first_special(text: str) -> list[int]:
        first = tokenizer(text.lstrip(), add_special_tokens=False).input_ids[:1]
        opens_chat = tokenizer.bos_token_id != tokenizer.eos_token_id and first == [tokenizer.bos_token_id]
        return first if special.issuperset(first) and not opens_chat else []

    def render_behind(chat: Messages) -> str:
        return render_chat(tokenizer, chat).rpartition(probe)[2]

    # Behind the last answer: gpt-oss closes earlier ones, and thoughts, with another token.
    closes_turn, closes_call = find_first_special(render_behind([question, answer])), []
    if not closes_turn:  # left open: what follows it ends it
        closes_turn = find_first_special(render_behind([question, answer, question]))
        call = {"type": "function", "function": {"name": "look", "arguments": {}}}
        asked: Messages = [question, {"role": "assistant", "content": "", "tool_calls": [call]}]
        try:
            closes_call = find_first_special(render_result(functools.partial(render_chat, tokenizer), asked))
        except UserError:  # a template without tools
            pass
    return list(dict.fromkeys([*closes_turn, tokenizer.eos_token_id, *eos_token_ids, *closes_call]))
