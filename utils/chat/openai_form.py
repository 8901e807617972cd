"""OpenAI's chat/completions as texts: what a request may say, and the JSON that answers it.

A field that is not known, or one whose value would change the reply and is not served (n 2, logprobs, a
response format), is refused by name: none is read over. What OpenAI's clients send along without an effect on
the reply (user, metadata, ...) may stand there.
"""

import json
import time
import uuid
from collections.abc import Iterable, Iterator
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from utils.chat.streaming import count_begun
from utils.console import UserError
from utils.decode.reply import Reply
from utils.prompts.messages import Chat, Messages

THOUGHT, CALL = ("<think>", "</think>"), ("<tool_call>", "</tool_call>")
FINISH = {"time": "length", "cancelled": "stop"}  # OpenAI's words for those of Reply


class Message(BaseModel):
    model_config = ConfigDict(extra="ignore")
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[dict[str, Any]] | None = None
    reasoning_content: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    name: str | None = None

    def convert(self) -> dict[str, Any]:
        """As templates take it. Raises UserError for content that is no text."""
        whole = [{"type": "text", "text": self.content or ""}]
        parts = self.content if isinstance(self.content, list) else whole
        strangers = [part.get("type") for part in parts if part.get("type") != "text"]
        if strangers:
            raise UserError(f"messages: content of the type {strangers[0]} cannot be read, only text")
        role = "system" if self.role == "developer" else self.role
        kept = {"reasoning_content", "tool_calls", "tool_call_id", "name"}
        texts = [part.get("text") for part in parts]
        if not all(isinstance(text, str | None) for text in texts):
            raise UserError("messages: a content part of the type text holds no text")
        text = "".join(str(text or "") for text in texts)
        return {"role": role, "content": text} | self.model_dump(include=kept, exclude_none=True)


class StreamOptions(BaseModel):
    include_usage: bool = False
    include_obfuscation: bool = False


class TemplateSwitch(BaseModel):
    """chat_template_kwargs, as vLLM has them: thinking on or off, by either name of the switch."""

    model_config = ConfigDict(extra="forbid")
    enable_thinking: bool | None = None
    thinking: bool | None = None


class ChatRequest(BaseModel):
    model_config = ConfigDict(extra="forbid")
    model: str
    messages: list[Message] = Field(min_length=1)
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    min_tokens: int = Field(0, ge=0)
    temperature: float | None = Field(None, ge=0, le=10)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: str | list[str | None] | None = None
    tools: list[dict[str, Any]] | None = None
    chat_template_kwargs: TemplateSwitch | None = None
    # Of these only the value that changes nothing is served.
    tool_choice: Literal["auto", "none"] | None = None
    n: Literal[1] | None = None
    logprobs: Literal[False] | None = None
    top_logprobs: Literal[0] | None = None
    frequency_penalty: Literal[0] | None = None
    presence_penalty: Literal[0] | None = None
    logit_bias: dict[str, float] | None = Field(None, max_length=0)
    response_format: dict[Literal["type"], Literal["text"]] | None = None
    # These change no reply.
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    parallel_tool_calls: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None

    @model_validator(mode="after")
    def check_last(self) -> "ChatRequest":
        if self.messages[-1].role not in ("user", "tool"):
            raise ValueError("the last message must be the user's or a tool's: there is nothing to reply to")
        return self

    @property
    def thinks(self) -> bool | None:
        switch = self.chat_template_kwargs or TemplateSwitch()
        return switch.thinking if switch.enable_thinking is None else switch.enable_thinking

    @property
    def most_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def stops(self) -> list[str]:
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return [stop for stop in given if stop]

    def convert(self) -> Chat:
        messages: Messages = [message.convert() for message in self.messages]
        return Chat(messages, tools=self.tools if self.tool_choice != "none" else None)


def split_marked(pieces: Iterable[str], with_calls: bool) -> Iterator[tuple[str, str]]:
    """(kind, text) of a reply's pieces: reasoning_content, content, or call, the JSON of a whole tool call.

    A thought is told only where a reply begins, so that an answer may speak of <think>. Blanks that begin a
    thought, an answer or what follows a call are dropped.
    """
    kind, held, begun = "start", "", False
    ends = {"reasoning_content": THOUGHT[1], "call": CALL[1], "content": CALL[0] if with_calls else ""}
    for piece in pieces:
        held += piece
        while True:
            if kind == "start":
                held = held.lstrip()
                if held != THOUGHT[0] and THOUGHT[0].startswith(held):
                    break  # it may become the mark
                kind = "reasoning_content" if held.startswith(THOUGHT[0]) else "content"
                held = held.removeprefix(THOUGHT[0])
            end = ends[kind]
            at = held.find(end) if end else -1
            ready = at if at >= 0 else 0 if kind == "call" else len(held) - count_begun(held, [end])
            text, held = held[:ready], held[ready:]
            text = text if begun or kind == "call" else text.lstrip()
            if text:
                begun = True
                yield kind, text
            if at < 0:
                break
            kind, held, begun = "call" if kind == "content" else "content", held[len(end) :], False
    rest = CALL[0] + held if kind == "call" else held
    if rest.strip():
        yield kind if kind == "reasoning_content" else "content", rest


def read_call(text: str, index: int) -> dict[str, Any] | None:
    """A tool call in OpenAI's form; None where the model wrote no JSON object with a name."""
    try:
        call = json.loads(text)
        name, arguments = call["name"], call.get("arguments", {})
    except (ValueError, TypeError, KeyError):
        return None
    arguments = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    function = {"name": name, "arguments": arguments}
    return {"index": index, "id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}


class Answer:
    """The JSON that answers one request, as a whole or as the chunks of a stream."""

    def __init__(self, model: str, reply: Reply):
        self.reply, self.calls, self.texts = reply, 0, {"content": "", "reasoning_content": ""}
        self.tool_calls: list[dict[str, Any]] = []
        self.head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def add(self, kind: str, text: str) -> dict[str, Any]:
        """What a piece adds to the message: the `delta` of a stream."""
        call = read_call(text, len(self.tool_calls)) if kind == "call" else None
        if call:
            self.tool_calls.append(call)
            return {"tool_calls": [call]}
        if kind == "call":  # no call after all: as the model wrote it
            kind, text = "content", CALL[0] + text + CALL[1]
        self.texts[kind] += text
        return {kind: text}

    @property
    def finish_reason(self) -> str:
        reason = FINISH.get(self.reply.finish_reason, self.reply.finish_reason)
        return "tool_calls" if self.tool_calls and reason == "stop" else reason

    def count_usage(self) -> dict[str, Any]:
        asked, said = len(self.reply.prompt), self.reply.new_tokens
        details = {"cached_tokens": self.reply.reused_tokens}
        return {
            "prompt_tokens": asked,
            "completion_tokens": said,
            "total_tokens": asked + said,
            "prompt_tokens_details": details,
        }

    def build_whole(self) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": self.texts["content"].strip()}
        if self.texts["reasoning_content"]:
            message["reasoning_content"] = self.texts["reasoning_content"].strip()
        if self.tool_calls:
            calls = [{key: call[key] for key in ("id", "type", "function")} for call in self.tool_calls]
            message |= {"content": message["content"] or None, "tool_calls": calls}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": self.finish_reason}
        return self.head | {"object": "chat.completion", "choices": [choice], "usage": self.count_usage()}

    def build_chunk(self, delta: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return self.head | {"object": "chat.completion.chunk", "choices": [choice]}

    def build_usage_chunk(self) -> dict[str, Any]:
        return self.head | {"object": "chat.completion.chunk", "choices": [], "usage": self.count_usage()}


def build_error(message: str, kind: str, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def describe_models(names: Iterable[str], created: int) -> dict[str, Any]:
    data = [{"id": name, "object": "model", "created": created, "owned_by": "user"} for name in names]
    return {"object": "list", "data": data}
