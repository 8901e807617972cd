"""OpenAI's chat/completions over HTTP: every request is a reply of the one shared decoder.

    POST /v1/chat/completions    GET /v1/models    GET /health (without a key)

The event loop takes a request, a thread renders and tokenizes it, and a thread of the reply's own turns
tokens into text and hands that to the loop. A client that hangs up ends its reply, also one that waits. Of
those that find no slot so many wait as --limit_queue says, the next one is answered 429.
"""

import asyncio
import dataclasses
import functools
import json
import secrets
import threading
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from utils.arguments import GenerationArguments
from utils.chat.generation import SAMPLING_DEFAULTS, ChatModel, build_generation_config
from utils.chat.openai_form import Answer, ChatRequest, build_error, describe_models, split_marked
from utils.chat.streaming import stream_text
from utils.console import UserError
from utils.decode.reply import Reply
from utils.models.tokenizer import ChatTokenizer
from utils.prompts.answer_spans import check_tools

KINDS = {401: "authentication_error", 404: "invalid_request_error", 429: "rate_limit_error"}


class Refused(Exception):
    """A request that is answered with an error in OpenAI's form."""

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None):
        super().__init__(message)
        self.status, self.code, self.param = status, code, param


@dataclasses.dataclass
class Server:
    """The model as it is served. `names`: {name: whether with the adapter}, the tuned model's first."""

    chat: ChatModel
    names: dict[str, bool]
    defaults: GenerationArguments
    slots: int
    slot_tokens: int
    limit_queue: int
    limit_seconds: float
    replies: list[Reply] = dataclasses.field(default_factory=list)
    encoding: Any = dataclasses.field(default_factory=threading.Lock)  # a tokenizer's settings are shared

    def count_open(self) -> int:
        """Replies under way or waiting."""
        self.replies = [reply for reply in self.replies if not reply.finish_reason]
        return len(self.replies)

    def check_room(self, asked: ChatRequest) -> None:
        """Raises Refused where there is no such model, or no place to wait in."""
        if asked.model not in self.names:
            raise Refused(
                404, f"no model {asked.model} here: {', '.join(self.names)}", "model_not_found", "model"
            )
        if self.count_open() >= self.slots + self.limit_queue:
            raise Refused(
                429, f"{len(self.replies)} replies are under way or waiting: ask again", "queue_full"
            )

    def encode(self, asked: ChatRequest) -> list[int]:
        """The prompt's token ids. Raises Refused or UserError where it is none, or too long."""
        chat, tokenizer = asked.convert(), self.choose_tokenizer(asked)
        # Too long whatever its tokens are: cutting 10 MB into them would take ten seconds.
        length = sum(len(message["content"]) for message in chat.messages)
        if length > self.slot_tokens * self.longest_token:
            raise self.refuse_long(f"{length:,} characters")
        if chat.tools or any(message.keys() > {"role", "content"} for message in chat.messages):
            check_tools(tokenizer.raw, chat)
        with self.encoding:
            prompt = tokenizer.encode_prompt(chat)
        if len(prompt) >= self.slot_tokens:
            raise self.refuse_long(f"{len(prompt)} tokens")
        return prompt

    def refuse_long(self, length: str) -> Refused:
        message = f"the messages are {length}: with the reply they may be {self.slot_tokens} tokens"
        return Refused(400, message, "context_length_exceeded", "messages")

    @functools.cached_property
    def longest_token(self) -> int:
        """Characters."""
        return max(map(len, self.chat.tokenizer.raw.get_vocab()))

    def begin(self, asked: ChatRequest, prompt: list[int]) -> Reply:
        self.check_room(asked)
        tokenizer, room = self.choose_tokenizer(asked), self.slot_tokens - len(prompt)
        config = build_generation_config(choose_flags(asked, self.defaults, room), tokenizer)
        tuned, lookup = self.names[asked.model], self.defaults.prompt_lookup
        reply = self.chat.decoder.reply(prompt, config, tuned, asked.seed, self.limit_seconds, lookup)
        self.replies.append(reply)
        return reply

    def choose_tokenizer(self, asked: ChatRequest) -> ChatTokenizer:
        """With thinking on or off as the request says, else as the run was trained."""
        tokenizer = self.chat.tokenizer
        if asked.thinks is None:
            return tokenizer
        if not tokenizer.style.has_switch:
            raise Refused(400, "the template has no switch for thinking", None, "chat_template_kwargs")
        return tokenizer.switch(asked.thinks)

    async def stream(self, asked: ChatRequest, reply: Reply) -> AsyncIterator[tuple[str, str]]:
        """(kind, text) as they come; however it ends, the reply ends too and its place is free."""
        text = stream_text(self.choose_tokenizer(asked), reply, asked.stops)  # its thought is in tags
        pieces = split_marked(text, bool(asked.tools))
        try:
            async for piece in iterate(pieces, reply):
                yield piece
        finally:
            reply.cancel()


def choose_flags(asked: ChatRequest, defaults: GenerationArguments, room: int) -> GenerationArguments:
    """The server's flags with what the request says. A temperature of 0 is greedy."""
    given = asked.model_dump(include={"temperature", "top_p", "top_k"}, exclude_none=True)
    samples = given.get("temperature", 1) > 0 if given else defaults.do_sample
    more: dict[str, Any] = given if samples else dict(SAMPLING_DEFAULTS)
    if asked.repetition_penalty is not None:
        more["repetition_penalty"] = asked.repetition_penalty
    most = min(asked.most_tokens or defaults.max_new_tokens, room)
    least = min(asked.min_tokens, most) or defaults.min_new_tokens
    return dataclasses.replace(defaults, do_sample=samples, max_new_tokens=most, min_new_tokens=least, **more)


async def iterate(pieces: Iterator[Any], reply: Reply) -> AsyncIterator[Any]:
    """An iterator that blocks, read by a thread of its own, which ends as soon as the reply does."""
    loop, arrived = asyncio.get_running_loop(), asyncio.Queue[Any]()

    def put(what: Any) -> None:
        try:
            loop.call_soon_threadsafe(arrived.put_nowait, what)
        except RuntimeError:  # the loop is closed: nobody reads any more
            reply.cancel()

    def read() -> None:
        try:
            for piece in pieces:
                put(piece)
            put(None)
        except Exception as error:  # raised again where the pieces are read
            put(error)

    threading.Thread(target=read, daemon=True).start()
    while (piece := await arrived.get()) is not None:
        if isinstance(piece, Exception):
            raise piece
        yield piece


async def cancel_when_gone(request: Request, reply: Reply) -> None:
    """Ends the reply of a client that hangs up; returns when the response is complete, too."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    reply.cancel()


def build_app(server: Server, api_key: str | None, hosts: list[str]) -> FastAPI:
    """`hosts`: names that it answers to; a page of another site could else use it (DNS rebinding)."""
    app, created, watchers = FastAPI(openapi_url=None), int(time.time()), set[asyncio.Task[None]]()
    app.add_middleware(answer_only_to, hosts=hosts)

    async def check_key(request: Request) -> None:
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if api_key and not secrets.compare_digest(given.encode(), api_key.encode()):
            raise Refused(401, "this server wants its key: Authorization: Bearer KEY", "invalid_api_key")

    @app.get("/health")
    async def tell_health() -> dict[str, Any]:
        count = server.count_open()
        busy = min(count, server.slots)
        return {"status": "ok", "replies": busy, "waiting": count - busy}

    guards = [Depends(check_key)]

    @app.get("/v1/models", dependencies=guards)
    async def list_models() -> dict[str, Any]:
        return describe_models(server.names, created)

    @app.get("/v1/models/{name:path}", dependencies=guards)
    async def show_model(name: str) -> dict[str, Any]:
        if name not in server.names:
            raise Refused(404, f"no model {name} here: {', '.join(server.names)}", "model_not_found", "model")
        return describe_models([name], created)["data"][0]

    @app.post("/v1/chat/completions", dependencies=guards)
    async def complete(asked: ChatRequest, request: Request) -> Any:
        server.check_room(asked)
        # A long prompt holds nobody else up.
        reply = server.begin(asked, await asyncio.to_thread(server.encode, asked))
        watcher = asyncio.create_task(cancel_when_gone(request, reply))
        watchers.add(watcher)
        watcher.add_done_callback(watchers.discard)
        answer, pieces = Answer(asked.model, reply), server.stream(asked, reply)
        if asked.stream:
            return StreamingResponse(write_events(asked, answer, pieces), media_type="text/event-stream")
        async for kind, text in pieces:
            answer.add(kind, text)
        return answer.build_whole()

    add_error_forms(app)
    return app


def answer_only_to(app: ASGIApp, hosts: list[str]) -> ASGIApp:
    """`app` for requests to these names; another is refused in OpenAI's form, not in plain text."""
    refusal = refuse(Refused(400, f"the header Host names another server than {', '.join(hosts)}"))

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        is_known = False

        async def let_in(*_: Any) -> None:
            nonlocal is_known
            is_known = True

        async def drop(message: Message) -> None:
            pass

        await TrustedHostMiddleware(let_in, hosts)(scope, receive, drop)
        await (app if is_known else refusal)(scope, receive, send)

    return answer


async def write_events(
    asked: ChatRequest, answer: Answer, pieces: AsyncIterator[tuple[str, str]]
) -> AsyncIterator[str]:
    """The server-sent events of a stream."""
    try:
        yield write_event(answer.build_chunk({"role": "assistant", "content": ""}))
        async for kind, text in pieces:
            yield write_event(answer.build_chunk(answer.add(kind, text)))
        yield write_event(answer.build_chunk({}, answer.finish_reason))
        if asked.stream_options and asked.stream_options.include_usage:
            yield write_event(answer.build_usage_chunk())
    except Exception as error:  # the status has been sent long ago
        yield write_event(build_error(str(error), "server_error"))
        raise
    yield "data: [DONE]\n\n"


def write_event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


def refuse(refused: Refused) -> JSONResponse:
    kind = KINDS.get(refused.status, "invalid_request_error")
    body = build_error(str(refused), kind, refused.code, refused.param)
    headers = {"Retry-After": "1"} if refused.status == 429 else {}
    return JSONResponse(body, refused.status, headers)


def add_error_forms(app: FastAPI) -> None:
    """Whatever goes wrong is said in OpenAI's form."""

    @app.exception_handler(Refused)
    async def say_refused(request: Request, error: Refused) -> JSONResponse:
        return refuse(error)

    @app.exception_handler(UserError)
    async def say_wrong(request: Request, error: UserError) -> JSONResponse:
        return refuse(Refused(400, str(error)))

    @app.exception_handler(RequestValidationError)
    async def say_invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            return refuse(Refused(400, f"the body is no JSON: {first['ctx']['error']}"))
        where = ".".join(str(part) for part in first["loc"][1:])
        return refuse(
            Refused(400, f"{where}: {first['msg']}" if where else first["msg"], None, where or None)
        )

    @app.exception_handler(HTTPException)
    async def say_http(request: Request, error: HTTPException) -> JSONResponse:
        return refuse(Refused(error.status_code, f"{error.detail}: {request.method} {request.url.path}"))

    @app.exception_handler(Exception)
    async def say_broken(request: Request, error: Exception) -> JSONResponse:
        return JSONResponse(build_error(f"{type(error).__name__}: {error}", "server_error"), 500)
