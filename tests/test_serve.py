"""The OpenAI-compatible server: the chat's own words, by openai's client, the judge and lm-eval; nothing lost or mixed."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import httpx
import openai
import pytest
import torch
import uvicorn
from helpers import IDENTITY, ROOT
from helpers.chats import stream_reply
from helpers.runs import train
from helpers.shell import find_free_port
from starlette.testclient import TestClient

from eval.serve_load import LoadArguments, measure
from utils.arguments import GenerationArguments, ModelArguments
from utils.chat.generation import load_run
from utils.chat.openai_form import split_marked
from utils.chat.server import Server, build_app
from utils.console import UserError
from utils.models.folder import resolve_model
from utils.prompts.answer_spans import read_template
from utils.serve import ServeArguments, choose_access, name_models

FLAGS = """--model_max_length 200 --lora_r 4 --gradient_checkpointing False --gradient_accumulation_steps 1
    --max_steps 4 --learning_rate 1e-2""".split()
HI = [{"role": "user", "content": "Who are you?"}]
GREEDY = GenerationArguments(max_new_tokens=24)


@pytest.fixture(scope="module")
def run(trained_run):
    return trained_run("--dataset_name", IDENTITY, *FLAGS)


@pytest.fixture(scope="module")
def chat(run):
    return load_run(resolve_model(ModelArguments(checkpoint_dir=str(run)), set()), torch.float32)


@contextmanager
def serving(chat, slots=4, slot_tokens=512, limit_queue=8, api_key=None, limit_seconds=600.0):
    """The address of a server in a thread of this process."""
    port, flags = find_free_port(), GenerationArguments(max_new_tokens=24, top_k=0)
    chat.decoder.open_slots(slots, slot_tokens, kept=0, for_many=True)
    server = Server(
        chat, {"mine": True, "base": False}, flags, slots, slot_tokens, limit_queue, limit_seconds
    )
    app = build_app(server, api_key, ["127.0.0.1"])
    running = uvicorn.Server(uvicorn.Config(app, "127.0.0.1", port, log_level="warning"))
    thread = threading.Thread(target=running.run, daemon=True)
    thread.start()
    while not running.started:
        time.sleep(0.02)
    yield f"http://127.0.0.1:{port}/v1"
    running.should_exit = True
    thread.join(60)
    assert not thread.is_alive()


@pytest.fixture(scope="module")
def url(chat):
    with serving(chat) as address:
        yield address


@pytest.fixture
def client(url):
    return openai.OpenAI(base_url=url, api_key="none", max_retries=0)


def tell(chat, messages, tuned=True, **flags):
    return "".join(
        stream_reply(chat, messages, GenerationArguments(**{"max_new_tokens": 24, **flags}), tuned)
    ).strip()


def wait_until(holds, seconds=20):
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_openai_client_is_told_what_the_chat_says_tuned_and_base(chat, client):
    assert [model.id for model in client.models.list()] == ["mine", "base"]
    for name, tuned in (("mine", True), ("base", False)):
        whole = client.chat.completions.create(model=name, messages=HI)
        assert whole.choices[0].message.content == tell(chat, HI, tuned)
        assert whole.usage.prompt_tokens == len(chat.tokenizer.encode_prompt(HI))
        assert whole.choices[0].finish_reason in ("stop", "length")
        if whole.choices[0].finish_reason == "length":
            assert whole.usage.completion_tokens == 24
        options = {"stream": True, "stream_options": {"include_usage": True}}
        chunks = list(client.chat.completions.create(model=name, messages=HI, **options))
        said = [chunk.choices[0] for chunk in chunks if chunk.choices]
        assert (
            "".join(choice.delta.content or "" for choice in said).strip() == whole.choices[0].message.content
        )
        assert said[0].delta.role == "assistant" and said[-1].finish_reason == whole.choices[0].finish_reason
        assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert tell(chat, HI) != tell(chat, HI, tuned=False)


def test_request_says_how_tokens_are_chosen_and_where_the_reply_ends(chat, client):
    def ask(**fields):
        return client.chat.completions.create(model="mine", messages=HI, **fields).choices[0]

    sampled = [ask(temperature=1.5, top_p=0.9, seed=seed).message.content for seed in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]
    assert ask(temperature=0, seed=5).message.content == tell(chat, HI)
    short = ask(max_tokens=3)
    assert short.finish_reason == "length" and short.message.content == tell(chat, HI, max_new_tokens=3)
    text = tell(chat, HI)
    stop = text[len(text) // 2 :][:4]
    ended = ask(stop=[stop])
    assert ended.finish_reason == "stop" and ended.message.content == text[: text.index(stop)].strip()
    penalized = ask(extra_body={"repetition_penalty": 3.0}).message.content
    assert penalized == tell(chat, HI, repetition_penalty=3.0)
    assert ask(temperature=1e-300).message.content == tell(chat, HI)  # as good as greedy


@pytest.mark.parametrize(
    ("change", "status", "param", "said"),
    [
        ({"model": "gpt-4"}, 404, "model", "no model gpt-4 here: mine, base"),
        ({"tempreature": 1}, 400, "tempreature", "not permitted"),
        ({"n": 2}, 400, "n", "1"),
        ({"logprobs": True}, 400, "logprobs", "False"),
        ({"temperature": -1}, 400, "temperature", "greater than or equal to 0"),
        ({"response_format": {"type": "json_object"}}, 400, "response_format.type", "text"),
        ({"messages": []}, 400, "messages", "at least 1 item"),
        ({"messages": [{"role": "assistant", "content": "Hi"}]}, 400, None, "nothing to reply to"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, None, "type image_url"),
        ({"messages": [{"role": "user", "content": "word " * 600}]}, 400, "messages", "they may be 512"),
        ({"messages": [{"role": "user", "content": "word " * 2_000_000}]}, 400, "messages", "characters"),
        ({"messages": [{"role": "user", "content": "\ud800 hi"}]}, 400, None, "half a character"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": 3}]}]},
            400,
            None,
            "holds no text",
        ),
        ({"seed": 2**64}, 400, "seed", "less than"),
        ({"repetition_penalty": 1e-300}, 400, "repetition_penalty", "greater than or equal"),
        ({"chat_template_kwargs": {"enable_thinking": True}}, 400, "chat_template_kwargs", "no switch"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, 400, None, "leaves out the tools"),
    ],
)
def test_mistake_is_an_error_in_openais_form(change, status, param, said, url):
    body = {"model": "mine", "messages": HI} | change
    headers = {"content-type": "application/json"}  # httpx's own json= wants whole characters
    answer = httpx.post(f"{url}/chat/completions", content=json.dumps(body), headers=headers)
    error = answer.json()["error"]
    assert answer.status_code == status and error["param"] == param and said in error["message"]
    assert error["type"] == "invalid_request_error"


def test_broken_json_and_a_wrong_path_are_errors_in_openais_form(url):
    broken = httpx.post(f"{url}/chat/completions", content="{", headers={"content-type": "application/json"})
    assert broken.status_code == 400 and broken.json()["error"]["param"] is None
    assert "the body is no JSON" in broken.json()["error"]["message"]
    wrong = httpx.get(f"{url}/engines")
    assert wrong.status_code == 404 and "GET /v1/engines" in wrong.json()["error"]["message"]


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1:port", "127.0.0.1.evil.example"])
def test_request_to_another_name_is_an_error_in_openais_form(url, host):
    foreign = httpx.get(f"{url}/models", headers={"host": host})
    assert foreign.status_code == 400 and "the header Host" in foreign.json()["error"]["message"]


def test_key_is_asked_for_everywhere_but_for_health(chat):
    with serving(chat, api_key="sesame") as url:
        for given in ("wrong", "none"):
            with pytest.raises(openai.AuthenticationError, match="wants its key"):
                openai.OpenAI(base_url=url, api_key=given).chat.completions.create(model="mine", messages=HI)
        assert openai.OpenAI(base_url=url, api_key="sesame").models.list().data[0].id == "mine"
        health = httpx.get(url.removesuffix("/v1") + "/health")
        assert health.json() == {"status": "ok", "replies": 0, "waiting": 0}


def test_server_for_others_has_a_key_and_one_for_this_machine_needs_none(capsys):
    key, hosts = choose_access(ServeArguments(server_name="0.0.0.0"))
    assert len(key) > 20 and key in capsys.readouterr().out and hosts == ["*"]
    assert choose_access(ServeArguments(server_name="0.0.0.0", api_key="mine")) == ("mine", ["*"])
    assert choose_access(ServeArguments())[1] == ["localhost", "127.0.0.1", "127.0.0.1", "[127.0.0.1]"]
    with pytest.raises(UserError, match="--api_key is empty"):
        ServeArguments(server_name="0.0.0.0", api_key="")


@pytest.mark.parametrize("name, host", [("127.0.0.2", "127.0.0.2:8000"), ("::1", "[::1]:8000")])
def test_server_answers_to_the_loopback_address_it_was_given(chat, name, host):
    key, hosts = choose_access(ServeArguments(server_name=name))
    server = Server(chat, {"mine": True}, GREEDY, 1, 64, 1, 60.0)
    with TestClient(build_app(server, key, hosts)) as client:
        assert client.get("/health", headers={"host": host}).status_code == 200
        assert client.get("/health", headers={"host": "evil.example"}).status_code == 400


def test_long_prompt_that_is_cut_into_tokens_holds_nobody_else_up(chat, url, monkeypatch):
    begun, ended = threading.Event(), threading.Event()
    encode = type(chat.tokenizer).encode_prompt

    def wait_and_encode(self, asked):
        begun.set()
        assert ended.wait(20)
        return encode(self, asked)

    monkeypatch.setattr(type(chat.tokenizer), "encode_prompt", wait_and_encode)
    ask = lambda: httpx.post(f"{url}/chat/completions", json={"model": "mine", "messages": HI})  # noqa: E731
    thread = threading.Thread(target=ask)
    thread.start()
    assert begun.wait(20)
    assert httpx.get(url.removesuffix("/v1") + "/health", timeout=5).status_code == 200
    ended.set()
    thread.join()


def test_full_queue_is_a_429_and_a_client_that_hangs_up_frees_its_place(chat):
    long = {"model": "mine", "messages": HI, "max_tokens": 400, "min_tokens": 400, "stream": True}
    with serving(chat, slots=1, limit_queue=1) as url, httpx.Client() as http:
        health = url.removesuffix("/v1") + "/health"
        with http.stream("POST", f"{url}/chat/completions", json=long) as first:
            lines = first.iter_lines()
            next(lines)
            with http.stream("POST", f"{url}/chat/completions", json=long) as second:
                assert second.status_code == 200
                refused = http.post(f"{url}/chat/completions", json=long)
                assert refused.status_code == 429 and refused.headers["retry-after"] == "1"
                assert refused.json()["error"]["type"] == "rate_limit_error"
                assert http.get(health).json() == {"status": "ok", "replies": 1, "waiting": 1}
        # Both have hung up, one of them before its first word.
        wait_until(lambda: http.get(health).json() == {"status": "ok", "replies": 0, "waiting": 0}, seconds=5)
        wait_until(lambda: not chat.decoder.is_busy, seconds=5)
        short = long | {"stream": False, "max_tokens": 4, "min_tokens": 4}
        assert http.post(f"{url}/chat/completions", json=short).status_code == 200


def test_client_without_a_stream_that_hangs_up_ends_its_reply(chat, url):
    body = {"model": "mine", "messages": HI, "max_tokens": 450, "min_tokens": 450}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{url}/chat/completions", json=body, timeout=0.3)
    wait_until(lambda: not chat.decoder.is_busy, seconds=3)


def test_tools_and_thoughts_go_through_the_template(chat, client):
    raw = chat.tokenizer.raw
    before, raw.chat_template = raw.chat_template, read_template("chatml")
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
    messages = [*HI, {"role": "assistant", "content": None, "tool_calls": [call]}]
    messages.append({"role": "tool", "tool_call_id": "1", "content": "sunny"})
    try:
        reply = client.chat.completions.create(model="mine", messages=messages, tools=tools, max_tokens=2)
        text = raw.apply_chat_template(
            [*HI, {"role": "assistant", "content": "", "tool_calls": [call | {"function": call["function"] | {"arguments": {"city": "Rome"}}}]}, messages[2]],
            tools=tools, tokenize=False, add_generation_prompt=True,
        )  # fmt: skip
        assert "weather" in text and "Rome" in text and "sunny" in text
        assert reply.usage.prompt_tokens == len(raw(text, add_special_tokens=False).input_ids)
    finally:
        raw.chat_template = before


MARKED = [
    ("<think>\nA < B.\n</think>\n\nYes <think> is a mark.", False,
     [("reasoning_content", "A < B.\n"), ("content", "Yes <think> is a mark.")]),
    ("<think>A\n</think>\n\nFour.", False, [("reasoning_content", "A\n"), ("content", "Four.")]),
    ("Hm.\n<tool_call>\n{\"name\": 1}\n</tool_call>\n<tool_call>{}</tool_call>", True,
     [("content", "Hm.\n"), ("call", "\n{\"name\": 1}\n"), ("call", "{}")]),
    ("<tool_call>{}</tool_call>", False, [("content", "<tool_call>{}</tool_call>")]),
    ("Ends in <tool_ca", True, [("content", "Ends in <tool_ca")]),
    ("<tool_call>{\"na", True, [("content", "<tool_call>{\"na")]),
    ("<think>never ends", False, [("reasoning_content", "never ends")]),
]  # fmt: skip


@pytest.mark.parametrize("cut", [1, 3, 1000])
@pytest.mark.parametrize(("text", "with_calls", "expected"), MARKED)
def test_thoughts_and_calls_are_told_apart_however_the_text_is_cut(text, with_calls, expected, cut):
    pieces = [text[i : i + cut] for i in range(0, len(text), cut)]
    joined = []
    for kind, piece in split_marked(pieces, with_calls):
        if joined and joined[-1][0] == kind != "call":
            joined[-1] = (kind, joined[-1][1] + piece)
        else:
            joined.append((kind, piece))
    assert joined == expected


def test_thought_and_call_reach_the_client_in_their_own_fields(chat, client, monkeypatch):
    """A model that writes them is not trained here: its text is put where the reply's text comes from."""
    said = '<think>\nLook.\n</think>\n\nWait.<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'

    def stream(tokenizer, reply, stops=()):
        yield from (said[i : i + 5] for i in range(0, len(said), 5))
        reply.cancel("stop")

    monkeypatch.setattr("utils.chat.server.stream_text", stream)
    monkeypatch.setattr("utils.chat.server.check_tools", lambda *_: None)
    fields = {"model": "mine", "messages": HI, "tools": [{"type": "function", "function": {"name": "f"}}]}
    whole = client.chat.completions.create(**fields).choices[0]
    assert whole.message.reasoning_content == "Look." and whole.message.content == "Wait."
    assert (
        whole.finish_reason == "tool_calls" and whole.message.tool_calls[0].function.arguments == '{"a": 1}'
    )
    deltas = [chunk.choices[0].delta for chunk in client.chat.completions.create(stream=True, **fields)]
    assert "".join(getattr(delta, "reasoning_content", "") or "" for delta in deltas) == "Look.\n"
    assert [call.function.name for delta in deltas for call in delta.tool_calls or []] == ["f"]


def test_judge_asks_it_unchanged(url, call_main, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    monkeypatch.setenv("OPENAI_BASE_URL", url)
    (tmp_path / "questions.jsonl").write_text('{"question_id": 1, "text": "What?", "category": "x"}\n')
    for name in ("one", "two"):
        row = {
            "question_id": 1,
            "text": f"Answer {name}",
            "answer_id": name,
            "model_id": name,
            "metadata": {},
        }
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    argv = [tmp_path / "one.jsonl", tmp_path / "two.jsonl", "--questions", tmp_path / "questions.jsonl"]
    argv += [
        "--model",
        "mine",
        "--attempts",
        "1",
        "--max_review_tokens",
        "8",
        "--output_dir",
        tmp_path / "out",
    ]
    with pytest.raises(UserError, match="no verdict in 1 replies"):  # the server answered, the model is tiny
        call_main("eval.judge", *argv)


def test_lm_eval_asks_it_unchanged(chat, url):
    pytest.importorskip("tenacity", reason="of lm_eval[api]")
    from lm_eval.api.instance import Instance
    from lm_eval.models.api_models import JsonChatStr
    from lm_eval.models.openai_completions import LocalChatCompletion

    model = LocalChatCompletion(model="mine", base_url=f"{url}/chat/completions", tokenized_requests=False)
    asked = JsonChatStr(json.dumps(HI))
    request = Instance("generate_until", {}, (asked, {"until": ["\n\n\n"], "max_gen_toks": 12}), 0)
    assert model.generate_until([request])[0].strip() == tell(chat, HI, max_new_tokens=12)


def test_many_clients_that_hang_up_lose_nobody_elses_word(chat):
    with serving(chat, slots=3, limit_queue=4) as url:
        flags = {"clients": 10, "seconds": 5.0, "prompts": 5, "prompt_tokens": 48, "reply_tokens": 16}
        figures = asyncio.run(measure(LoadArguments(url=url, **flags)))
    assert figures["wrong"] == [] and figures["lost"] == []
    assert figures["complete"] > 5 and figures["hung_up"] > 1 and figures["refused_429"] > 0
    wait_until(lambda: not chat.decoder.is_busy, seconds=5)


def start_server(run, *flags):
    port = find_free_port()
    command = [sys.executable, "-m", "utils.serve", "--checkpoint_dir", str(run), "--server_port", str(port)]
    process = subprocess.Popen(
        [*command, *flags], cwd=ROOT, stdout=subprocess.PIPE, text=True, env=os.environ
    )
    printed = next(line for line in process.stdout if "/v1 serves " in line)
    url = f"http://127.0.0.1:{port}"
    wait_until(lambda: answers(url), 60)
    return process, url, printed


def answers(url):
    try:
        return httpx.get(f"{url}/health").status_code == 200
    except httpx.HTTPError:
        return False


def test_server_that_is_asked_to_end_lets_the_reply_under_way_end(run):
    process, url, printed = start_server(run, "--slot_tokens", "256")
    names = list(name_models(resolve_model(ModelArguments(checkpoint_dir=str(run)), set())))
    assert f"serves {' and '.join(names)}: 8 replies at once, 256 tokens each" in printed
    body = {"model": names[0], "messages": HI, "max_tokens": 150, "min_tokens": 150, "stream": True}
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=60) as stream:
        lines = stream.iter_lines()
        next(lines)
        process.send_signal(signal.SIGTERM)
        assert [line for line in lines if line][-1] == "data: [DONE]"
    assert process.wait(30) == 0 and "stopped" in process.stdout.read()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--slots", "0"], "--slots 0"),
        (["--limit_queue", "-1"], "--limit_queue -1 is negative"),
        (["--server_port", "70000"], "is no port"),
        (["--temprature", "1"], "unknown flag"),
    ],
)
def test_mistakes_are_said_before_weights_load(flags, said, call_main, run):
    with pytest.raises(UserError, match=said):
        call_main("utils.serve", "--checkpoint_dir", run, *flags)


@pytest.mark.alone
@pytest.mark.slow
def test_64_clients_for_two_minutes_at_the_135m_model(call_main, smollm2, tmp_path):
    """On two cores: 8 slots, prompts and replies of 128 tokens, a third hang up."""
    flags = """--lora_r 16 --learning_rate 1e-3 --max_steps 4 --per_device_train_batch_size 4
        --gradient_accumulation_steps 1 --gradient_checkpointing False --dataset_name""".split()
    train(call_main, smollm2, tmp_path / "run", *flags, IDENTITY)
    process, url, _ = start_server(tmp_path / "run", "--slot_tokens", "512")
    try:
        asked = LoadArguments(url=f"{url}/v1", server_pid=process.pid, prompts=6)
        figures = asyncio.run(measure(asked))
    finally:
        process.terminate()
        process.wait(60)
    print(json.dumps(figures, indent=2))
    assert figures["wrong"] == [] and figures["lost"] == [] and figures["complete"] > 20
    assert figures["refused_429"] > 0 or figures["complete"] + figures["hung_up"] > 64
    assert figures["memory_mb"]["end"] < 1.05 * figures["memory_mb"]["first_third"]
    assert figures["gap_p95_ratio"] <= 3
