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
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from utils.console import UserError, notice_once
from utils.messages import TEXT_ROLE, UNTRAINED, Chat, Messages

TEMPLATES_DIR = Path(__file__).parent / "templates"
PLAIN_KEYS = {"role", "content"}
TOOLS_CURE = (
    "(those of Qwen2.5, Qwen3 and Llama 3.1 show them; where <|im_end|> is a token, --template chatml does)"
)
Render = Callable[[Messages, bool], str]  # messages, whether a generation prompt follows
Span = tuple[int, int]  # characters [start, end) of a rendered text


def template_names() -> list[str]:
    return sorted(path.stem for path in TEMPLATES_DIR.glob("*.jinja"))


def read_template(name: str) -> str:
    """Source of utils/templates/NAME.jinja. Raises UserError for an unknown name."""
    if name not in template_names():
        raise UserError(f"--template {name}: no such template; use one of {', '.join(template_names())}")
    return (TEMPLATES_DIR / f"{name}.jinja").read_text(encoding="utf-8")


def find_input_marker(tokenizer: Any) -> str:
    """What goes between a question and its input: Stanford's heading where the template looks for it."""
    return "\n\n### Input:\n" if "### Input:" in tokenizer.chat_template else "\n\n"


def render_chat(
    tokenizer: Any, messages: Messages, add_generation_prompt: bool = False, tools: list[Any] | None = None
) -> str:
    """The chat as text. Every prompt of training, samples, chat and evaluation comes from here."""
    try:
        return apply_template(tokenizer, messages, add_generation_prompt, tools)
    except (TemplateError, TypeError) as error:  # TypeError: a template that adds what is no text
        if [message["role"] for message in messages[:2]] != ["system", "user"]:
            raise UserError(f"the chat template refuses these messages: {error}") from error
    notice_once("the chat template takes no system message: it goes before the first user text")
    merged = {"role": "user", "content": f"{messages[0]['content']}\n\n{messages[1]['content']}"}
    return render_chat(tokenizer, [merged, *messages[2:]], add_generation_prompt, tools)


def apply_template(
    tokenizer: Any, messages: Messages, add_generation_prompt: bool, tools: list[Any] | None
) -> str:
    """tokenizer.apply_chat_template. Plain messages skip its copies and checks: 34 microseconds, not 47.

    Templates never see which answers are context (UNTRAINED).
    """
    if has_more := any(message.keys() != PLAIN_KEYS for message in messages):
        messages = [{key: message[key] for key in message if key != UNTRAINED} for message in messages]
        has_more = any(message.keys() != PLAIN_KEYS for message in messages)
    if tools or has_more:
        render = functools.partial(
            tokenizer.apply_chat_template,
            tools=tools,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )
        try:
            return render([convert_arguments(message, dict) for message in messages])
        except TypeError:  # DeepSeek-V3's adds the arguments to a text
            return render([convert_arguments(message, str) for message in messages])
    return compile_template(tokenizer.chat_template).render(
        tokenizer.special_tokens_map,
        messages=messages,
        add_generation_prompt=add_generation_prompt,
        tools=None,
        documents=None,
    )


@functools.cache
def compile_template(source: str) -> Any:
    """transformers' jinja template. Renderings copy its globals, 5 us faster from a dict than a ChainMap."""
    from transformers.utils.chat_template_utils import _compile_jinja_template

    template = _compile_jinja_template(source)
    template.globals = dict(template.globals)
    return template


def convert_arguments(message: dict[str, Any], kind: type) -> dict[str, Any]:
    """The message with the arguments of its calls as an object (`dict`) or as its JSON (`str`).

    OpenAI's files have the JSON; transformers' templates take the object, and quote a JSON text once more.
    """
    if not message.get("tool_calls"):
        return message
    calls = []
    for call in message["tool_calls"]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict):
            raise TypeError(f"the tool call {str(call)[:40]!r} is no object with a function")
        arguments = function.get("arguments")
        try:
            if kind is dict and isinstance(arguments, str):
                function = function | {"arguments": json.loads(arguments)}
            elif kind is str and not isinstance(arguments, str):
                function = function | {"arguments": json.dumps(arguments, ensure_ascii=False)}
        except json.JSONDecodeError:  # no JSON: the template shows it as it stands
            pass
        calls.append(call | {"function": function} if "function" in call else function)
    return message | {"tool_calls": calls}


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


def split_prompt(render: Render, messages: Messages, stops: list[str]) -> tuple[str, list[Span]]:
    """The text of a chat that ends before an assistant turn, and where its earlier answers are.

    None are found where the template rewrites earlier answers (Qwen3, gpt-oss, DeepSeek-V3).
    """
    prompt, answers = render(messages, True), []
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
    learned = [turn for turn in turns if messages[turn].get(UNTRAINED, True)]
    if learned:  # an answer behind the last one that is learned is nobody's context
        messages = messages[: learned[-1] + 1]
        turns = answer_turns(messages)
    rows: list[RenderedRow] = []
    while turns:
        *earlier, last = turns
        prompt, answers = split_prompt(render, messages[:last], stops)
        text = prompt + render_turn(render, messages, last, stops, prompt)[1]
        rewritten = bool(earlier) and not answers
        answers = [*answers, (find_border(prompt), len(text))]
        spoken = turns[-len(answers) :]  # the turns of these answers: all, or the last one alone
        trained = [
            span for turn, span in zip(spoken, answers, strict=True) if messages[turn].get(UNTRAINED, True)
        ]
        never = [span for span in answers if span not in trained]
        hidden = [message for turn, message in enumerate(messages[:last]) if turn not in spoken]
        if not all(message.get(UNTRAINED, True) for message in hidden):
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
            if not render(messages[: i + 1], False).startswith(render(messages[:i], True)):
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
    asked = next(
        (i for i, message in enumerate(messages) if message["role"] not in ("system", "assistant")), None
    )
    if asked is None:
        return []
    return [i for i, message in enumerate(messages) if message["role"] == "assistant" and i > asked]


def render_turn(
    render: Render, messages: Messages, turn: int, stops: list[str], prompt: str | None = None
) -> tuple[str, str]:
    """(prompt, answer) of one assistant turn; the answer ends with its stop token, rendered or appended."""
    prompt = render(messages[:turn], True) if prompt is None else prompt
    whole = render(messages[: turn + 1], False)
    # A generation prompt that opens what the template drops later (<think>) is no prefix: the bare answer.
    rest = whole[len(prompt) :] if whole.startswith(prompt) else messages[turn]["content"].strip()
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

    closes_turn, closes_call = find_first_special(render_behind([question, answer, question])), []
    if not find_first_special(render_behind([question, answer])):  # left open: what follows it ends it
        call = {"type": "function", "function": {"name": "look", "arguments": {}}}
        asked: Messages = [question, {"role": "assistant", "content": "", "tool_calls": [call]}]
        try:
            closes_call = find_first_special(render_result(functools.partial(render_chat, tokenizer), asked))
        except UserError:  # a template without tools
            pass
    return list(dict.fromkeys([*closes_turn, tokenizer.eos_token_id, *eos_token_ids, *closes_call]))
