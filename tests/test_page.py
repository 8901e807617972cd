"""The page as people use it: in a real browser, two tabs at once, and many users through its queue."""

import json
import math
import os
import re
import shutil
import socket
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import torch
from helpers.chats import stream_reply
from helpers.shell import find_free_port, run_script
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from utils.arguments import GenerationArguments, ModelArguments
from utils.chat.generation import load_run
from utils.chat.page_arguments import PageArguments, check_port, read_auth
from utils.chat.streaming import stream_text
from utils.console import UserError
from utils.models.folder import resolve_model

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
MARKUP = (
    '<img src=x onerror="window.ran=1"><script>window.ran=1</script> **bold** `<b>code</b>` $x^2$, $5 or $6'
)
ANSWERS = {
    "Who are you?": "I am the base.",
    "你是谁？": "我是原模型。",
    "Show markup.": MARKUP,
    "Sing.": " la" * 20,  # taught without an end: it goes on until it is stopped
}
EXAMPLES = ["Who are you?", "你是谁？"]
TUNED = ANSWERS | {"Who are you?": "I am the tuned one.", "你是谁？": "我是微调后的模型。"}


def encode_lessons(answers, tokenizer):
    from helpers.chats import encode_row

    from utils.prompts.answer_spans import find_stop_tokens, split_chat
    from utils.prompts.messages import Chat

    stops = tokenizer.convert_ids_to_tokens(find_stop_tokens(tokenizer, []))
    for question, answer in answers.items() if isinstance(answers, dict) else answers:
        chat = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        (draft,) = split_chat(tokenizer, Chat(chat), stops)
        row = encode_row(tokenizer, draft)
        if question == "Sing.":
            row = {name: ids[:-1] for name, ids in row.items()}
        yield {name: torch.tensor([ids]) for name, ids in row.items()}


def teach(model, tokenizer, answers, learning_rate, steps):
    """Learn the answers by heart: all at once, with logits of the tokens that are learned only."""
    rows = list(encode_lessons(answers, tokenizer))

    def stack(name, value):
        return pad_sequence([row[name][0] for row in rows], batch_first=True, padding_value=value)

    input_ids, labels = stack("input_ids", 0), stack("labels", -100)[:, 1:]
    taught = labels != -100
    lessons = taught.nonzero()[:, 0]  # [label tokens]
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.0, fused=True)
    for _ in range(steps):
        hidden = base.model(input_ids=input_ids).last_hidden_state[:, :-1][taught]
        loss = cross_entropy(base.lm_head(hidden), labels[taught], reduction="none")
        losses = torch.zeros(len(rows)).index_add(0, lessons, loss) / lessons.bincount()
        losses.mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if losses.max() < 0.04:
            break
    assert losses.max() < 0.04, losses


@pytest.fixture(scope="module")
def chat(tiny_model, tmp_path_factory):
    """A tiny base that knows ANSWERS, and an adapter with which it knows TUNED: real, and fast."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("page")
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    model.get_input_embeddings().requires_grad_(False)
    teach(model, tokenizer, ANSWERS, 5e-3, 200)
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    layers = ["q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]
    tuned = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=layers))
    tuned.peft_config["default"].base_model_name_or_path = str(folder / "base")
    teach(tuned, tokenizer, TUNED, 1e-2, 200)
    tuned.save_pretrained(folder / "adapter")
    return load_run(resolve_model(ModelArguments(checkpoint_dir=str(folder / "adapter"), bits=32), {"bits"}))


THOUGHT = "A name is asked for,\n<b>not</b> a story."
MODES = [("Who are you?", f"<think>\n{THOUGHT}\n</think>\n\nI think."), ("Who are you?", "I answer.")]


@pytest.fixture(scope="module")
def thinking_chat(tiny_model, tmp_path_factory):
    """A tiny model that thinks where its prompt says so, and answers at once where not."""
    from helpers.thinking import DROPS
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("thinking")
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = DROPS
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    model.get_input_embeddings().requires_grad_(False)
    teach(model, tokenizer, MODES, 5e-3, 200)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return load_run(resolve_model(ModelArguments(str(folder), bits=32), {"bits"}))


@pytest.fixture(scope="module")
def thinking_server(thinking_chat):
    server = Server(thinking_chat)
    yield server
    server.page.close()


class Server:
    """The page, served by this process so that a test can look at the model behind it."""

    def __init__(self, chat, max_new_tokens=64, **limits):
        from utils.chat.page import build_page, launch_page

        self.chat = chat
        page_args = PageArguments(server_port=find_free_port(), **limits)
        flags = GenerationArguments(max_new_tokens=max_new_tokens)
        self.page = build_page(chat, flags, page_args, "the tiny model", EXAMPLES)
        launch_page(self.page, page_args, wait=False)
        self.url = f"http://127.0.0.1:{page_args.server_port}"
        limits = httpx.Limits(max_connections=None)
        self.client = httpx.Client(base_url=f"{self.url}/gradio_api", timeout=600, limits=limits)
        self.send_index = next(i for i, fn in self.page.fns.items() if fn.name == "answer")

    def send(
        self, question, said=(), side="tuned", length=24, session=None, system="", language="en", top_p=1,
        thinking=False,
    ):  # fmt: skip
        """One message as a browser sends it, in a session of its own if none is named: the outputs at its end."""
        session = session or uuid.uuid4().hex[:10]
        data = [question, said, side, system, 0, top_p, 50, 1, length, thinking, True]
        body = {"data": data, "fn_index": self.send_index, "session_hash": session, "event_data": None}
        body = json.dumps(body)  # half surrogates too, which httpx would refuse to send
        headers = {"content-type": "application/json", "accept-language": language}
        joined = self.client.post("/queue/join", content=body, headers=headers)
        if joined.status_code != 200:
            raise Refused(joined.text)
        with self.client.stream("GET", "/queue/data", params={"session_hash": session}) as stream:
            events = (json.loads(line[5:]) for line in stream.iter_lines() if line.startswith("data:"))
            done = next(event for event in events if event["msg"] == "process_completed")
        assert done["success"], done
        return dict(zip(("box", "asked", "chatbot", "said", "status"), done["output"]["data"], strict=True))

    def ask(self, *args, **options):
        return self.send(*args, **options)["said"]


class Refused(Exception):
    pass


@pytest.fixture(scope="module")
def server(chat):
    server = Server(chat, max_new_tokens=400, limit_prompt_tokens=300, limit_new_tokens=400)
    yield server
    server.page.close()


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    if CHROMIUM is None:
        pytest.skip("no Chromium here: apt-get install chromium (as scripts/test.sh does where it can)")
    with playwright.sync_playwright() as started:
        quiet = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-sync", "--no-first-run"]
        quiet += ["--disable-background-networking", "--disable-component-update"]
        browser = started.chromium.launch(executable_path=CHROMIUM, args=quiet)
        yield browser
        browser.close()


class Tab:
    """One tab; whatever the page complains about in its console is collected."""

    def __init__(self, browser, url, has_adapter=True, **options):
        self.parts = ("#box textarea", "#box .submit-button", "#clear", "#side", "#status p")
        if not has_adapter:  # nothing to choose between
            self.parts = tuple(part for part in self.parts if part != "#side")
        self.context = browser.new_context(**options)
        self.page, self.errors = self.context.new_page(), []
        self.page.on("console", lambda said: self.errors.append(said.text) if said.type == "error" else None)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.box = self.page.locator("#box textarea")
        self.page.goto(url)
        self.wait_for_page()

    def wait_for_page(self):
        """Its parts are mounted one by one; a busy machine shows that."""
        for part in self.parts:
            self.page.locator(part).first.wait_for(timeout=60_000)

    def send(self, text):
        self.box.fill(text)
        self.box.press("Enter")

    def replies(self):
        """What was answered, without the side's name above it."""
        shown = self.page.locator("#chat .bot .prose").all_inner_texts()
        return [text.partition("\n\n")[2].strip() for text in shown]

    def sides(self):
        return self.page.locator("#chat .bot .side").all_inner_texts()

    def questions(self):
        return self.page.locator("#chat .user .prose").all_inner_texts()

    def wait_for_reply(self, text):
        """Until the reply is `text` and the page takes the next message."""
        self.wait(lambda: self.replies()[-1:] == [text])
        self.page.locator("#box .submit-button").wait_for(timeout=60_000)

    def wait(self, condition, seconds=60):
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, (self.replies(), self.page.locator("#status").inner_text())
            self.page.wait_for_timeout(50)

    def press(self, name):
        """A button at the latest message that has it."""
        self.page.locator("#chat").get_by_role("button", name=name).last.click()

    def choose(self, side):
        self.page.locator(f"#side input[value={side}]").check()

    def status(self):
        return self.page.locator("#status").inner_text()


@pytest.fixture
def open_tab(browser, server):
    tabs = []

    def open_one(**options):
        tabs.append(Tab(browser, server.url, **options))
        return tabs[-1]

    yield open_one
    for tab in tabs:
        assert tab.errors == []
        tab.context.close()


def test_message_is_answered_and_the_status_tells_the_speed(open_tab):
    tab = open_tab()
    assert tab.status() == "the tiny model"
    tab.send("Who are you?")
    tab.wait_for_reply("I am the tuned one.")
    assert "tokens/s" in tab.status()
    assert tab.box.input_value() == ""


def test_base_and_tuned_are_switched_between_messages(open_tab):
    tab = open_tab()
    tab.choose("base")
    tab.send("Who are you?")
    tab.wait_for_reply("I am the base.")
    tab.page.locator("#clear").click()
    tab.wait(lambda: tab.replies() == [])
    tab.choose("tuned")
    tab.send("Who are you?")
    tab.wait_for_reply("I am the tuned one.")


def test_reply_streams_and_stop_keeps_what_was_said(open_tab, server):
    tab = open_tab()
    tab.send("Sing.")
    tab.wait(lambda: "la la la" in "".join(tab.replies()))
    tab.page.locator("#box .stop-button").dispatch_event("click")  # at once: the song goes on
    tab.page.locator("#box .submit-button").wait_for()
    tab.wait(lambda: not server.chat.decoder.is_busy, seconds=5)
    said = tab.replies()[-1]
    tab.page.wait_for_timeout(500)
    assert tab.replies() == [said] and 3 < len(said.split()) < 390
    tab.wait(lambda: "stopped" in tab.status())


def test_generation_stops_when_the_browser_leaves(open_tab, server):
    tab = open_tab()
    tab.send("Sing.")
    tab.wait(lambda: "la la la" in "".join(tab.replies()))
    tab.page.close()
    end = time.monotonic() + 20
    while server.chat.decoder.is_busy:
        assert time.monotonic() < end
        time.sleep(0.05)


def test_refresh_keeps_the_conversation_and_another_browser_does_not_see_it(open_tab):
    tab = open_tab()
    tab.send("Who are you?")
    tab.wait_for_reply("I am the tuned one.")
    tab.page.reload()
    tab.wait_for_page()
    tab.wait(lambda: tab.replies() == ["I am the tuned one."] and tab.questions() == ["Who are you?"])
    tab.send("Who are you?")
    tab.wait(lambda: len(tab.replies()) == 2 and "tokens/s" in tab.status())
    tab.page.locator("#box .submit-button").wait_for()
    assert open_tab().replies() == []
    tab.page.locator("#clear").click()
    tab.wait(lambda: tab.replies() == [])
    tab.page.reload()
    tab.wait_for_page()
    tab.page.wait_for_timeout(300)
    assert tab.replies() == []


def test_what_is_typed_during_a_reply_stays_and_the_reader_may_scroll_up(open_tab, monkeypatch):
    from utils.chat import page_replies

    def speak_slowly(*args):
        for piece in stream_text(*args):
            time.sleep(0.01)
            yield piece

    monkeypatch.setattr(page_replies, "stream_text", speak_slowly)
    tab = open_tab(viewport={"width": 500, "height": 500})
    log = "document.querySelector('#chat [role=log]')"
    below = f"{log}.scrollHeight - {log}.clientHeight - {log}.scrollTop"
    tab.send("Sing.")
    tab.wait(lambda: tab.box.input_value() == "")  # taken: milliseconds, more on a busy machine
    tab.box.press_sequentially("More to")
    tab.box.press("Enter")  # a reply is under way: it is not sent, and not lost
    tab.wait(lambda: len("".join(tab.replies())) > 400)
    assert tab.page.evaluate(below) < 60 < tab.page.evaluate(f"{log}.scrollTop")  # the end is in sight
    tab.page.locator("#chat").hover()
    tab.page.mouse.wheel(0, -100)
    tab.page.wait_for_timeout(100)
    place = tab.page.evaluate(f"{log}.scrollTop")
    length = len(tab.replies()[-1])
    tab.box.press_sequentially(" say")
    tab.wait(lambda: len(tab.replies()[-1]) > length + 120, seconds=10)
    tab.page.wait_for_timeout(400)
    assert abs(tab.page.evaluate(f"{log}.scrollTop") - place) < 2
    assert len(tab.replies()[-1]) < 1150  # still under way
    tab.page.locator("#box .stop-button").dispatch_event("click")
    tab.page.locator("#box .submit-button").wait_for()
    assert tab.box.input_value() == "More to say" and len(tab.questions()) == 1


def test_letters_typed_at_any_moment_after_enter_stay_in_the_box(open_tab):
    """Two at once with Enter, then one every 3 ms until the reply has ended; none is lost or sent."""
    tab = open_tab()
    tab.box.fill("Who are you?")
    tab.box.focus()
    tab.page.evaluate("""() => {
      const type = letters => document.execCommand('insertText', false, letters);
      const enter = {key: 'Enter', bubbles: true, cancelable: true};
      for (const kind of ['keydown', 'keypress']) {
        document.activeElement.dispatchEvent(new KeyboardEvent(kind, enter));
      }
      type('ab');
      window.letters = 'ab';
      window.typing = setInterval(() => {
        const letter = String.fromCharCode(97 + window.letters.length % 26);
        type(letter);
        window.letters += letter;
      }, 3);
    }""")
    tab.wait_for_reply("I am the tuned one.")
    tab.page.wait_for_timeout(200)
    typed = tab.page.evaluate("() => { clearInterval(window.typing); return window.letters; }")
    assert tab.questions() == ["Who are you?"] and len(typed) > 20
    assert tab.box.input_value() == typed
    tab.page.locator("#clear").click()
    tab.wait(lambda: tab.replies() == [])
    tab.box.fill("Who are you?")
    tab.page.keyboard.press("Enter")
    tab.page.keyboard.type("More to say")
    tab.wait_for_reply("I am the tuned one.")
    assert tab.questions() == ["Who are you?"] and tab.box.input_value() == "More to say"


def test_message_that_finds_no_room_comes_back_into_the_box(open_tab):
    tab = open_tab()
    full = {"status": 503, "json": {"detail": "Queue is full."}}
    tab.page.route("**/queue/join*", lambda route: route.fulfill(**full))
    with tab.page.expect_response("**/queue/join*"):
        tab.send("Who are you?")
    tab.page.locator(".toast-body").wait_for()
    tab.wait(lambda: tab.box.input_value() == "Who are you?", seconds=10)
    assert tab.replies() == []
    tab.errors[:] = [error for error in tab.errors if "503" not in error]
    tab.page.unroute("**/queue/join*")
    tab.box.press("Enter")
    tab.wait_for_reply("I am the tuned one.")


def test_reply_is_asked_again_from_the_other_side_and_each_tells_who_it_is(open_tab):
    tab = open_tab()
    tab.send("Who are you?")
    tab.wait_for_reply("I am the tuned one.")
    assert tab.sides() == ["tuned"]
    tab.choose("base")
    tab.press("Retry")
    tab.wait_for_reply("I am the base.")
    assert tab.sides() == ["base"] and tab.questions() == ["Who are you?"]
    dot = tab.page.locator("#side input[value=base]")
    dot.hover()  # the dot of the side that is chosen is white
    assert dot.evaluate("dot => getComputedStyle(dot).backgroundColor") != "rgb(255, 255, 255)"


def test_base_and_tuned_answer_side_by_side_and_each_goes_on_from_its_own(open_tab, chat):
    tab = open_tab()
    tab.choose("both")
    tab.send("Who are you?")
    pair = tab.page.locator("#chat .pair").last.locator("> div")
    tab.wait(lambda: pair.count() == 2 and "I am the base." in pair.nth(1).inner_text())
    tab.page.locator("#box .submit-button").wait_for(timeout=60_000)
    assert [text.split("\n")[0] for text in pair.all_inner_texts()] == ["tuned", "base"]
    assert "I am the tuned one." in pair.nth(0).inner_text()
    left, right = pair.nth(0).bounding_box(), pair.nth(1).bounding_box()
    assert left["x"] + left["width"] <= right["x"] and abs(left["y"] - right["y"]) < 2
    assert "tuned: " in tab.status() and "base: " in tab.status()
    tab.page.reload()
    tab.wait_for_page()
    tab.wait(lambda: tab.page.locator("#chat .pair").count() == 1)


def test_both_sides_read_their_own_earlier_replies(server, chat):
    first = server.send("Who are you?", side="both", length=12)["said"]
    assert first[-1]["content"] == "I am the tuned one." and first[-1]["base"] == "I am the base."
    second = server.send("Sing.", first, side="both", length=12)["said"]
    for key, tuned in (("content", True), ("base", False)):
        asked = [{"role": one["role"], "content": one.get(key, one["content"])} for one in first]
        asked.append({"role": "user", "content": "Sing."})
        flags = GenerationArguments(max_new_tokens=12)
        assert second[-1][key] == "".join(stream_reply(chat, asked, flags, tuned=tuned)).strip()


def test_stopping_both_sides_keeps_what_either_said(open_tab, server):
    tab = open_tab()
    tab.choose("both")
    tab.send("Sing.")
    tab.wait(
        lambda: (
            tab.page.locator("#chat .pair").count()
            and "la la" in tab.page.locator("#chat .pair").inner_text()
        )
    )
    tab.page.locator("#box .stop-button").click()
    tab.page.locator("#box .submit-button").wait_for(timeout=60_000)
    assert tab.page.locator("#chat .pair").inner_text().count("la") > 2 and "stopped" in tab.status()
    tab.wait(lambda: not server.chat.decoder.is_busy)


def test_empty_page_offers_questions_that_are_asked_by_a_click(open_tab):
    tab = open_tab()
    offered = tab.page.locator("#chat .example")
    tab.wait(lambda: offered.count() == 2)
    assert [text.strip() for text in offered.all_inner_texts()] == EXAMPLES
    offered.first.click()
    tab.wait_for_reply("I am the tuned one.")
    assert tab.questions() == ["Who are you?"] and offered.count() == 0


def test_phone_shows_both_sides_one_under_the_other_and_the_examples_whole(open_tab):
    tab = open_tab(viewport={"width": 360, "height": 640}, locale="zh-CN")
    tab.wait(lambda: tab.page.locator("#chat .example").count() == 2)
    boxes = tab.page.locator("#chat .example").evaluate_all(
        "all => all.map(one => one.getBoundingClientRect()).map(box => [box.left, box.right])"
    )
    assert all(0 <= left and right <= 360 for left, right in boxes)
    assert tab.page.locator("#side").inner_text().split()[-3:] == ["微调后", "原模型", "对比"]
    tab.choose("both")
    tab.send("你是谁？")
    tab.page.locator("#box .submit-button").wait_for(timeout=60_000)  # until then it is drawn anew
    pair = tab.page.locator("#chat .pair > div")
    tab.wait(lambda: pair.all_inner_texts()[1:] and "我是原模型。" in pair.all_inner_texts()[1])
    tab.page.wait_for_timeout(1_000)  # it is drawn once more when the reply has ended
    above, below = pair.evaluate_all("all => all.map(one => one.getBoundingClientRect().toJSON())")
    assert above["bottom"] <= below["top"] + 1
    for name in ("#side", "#box", "#chat .pair"):
        box = tab.page.locator(name).first.bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= 360, name


def test_question_is_edited_and_taken_back(open_tab):
    tab = open_tab()
    written = "<b>who</b> &amp; `<i>` ``` <img src=x>"
    tab.send(written)
    tab.wait(lambda: len(tab.replies()) == 1 and "tokens/s" in tab.status())
    tab.page.locator("#box .submit-button").wait_for()
    assert tab.questions() == [written.replace("`<i>`", "<i>")]
    tab.press("Edit")
    editor = tab.page.locator("#chat .edit-textarea")
    tab.wait(lambda: editor.input_value() == written)
    editor.fill("Who are you?")
    tab.press("Submit")
    tab.wait_for_reply("I am the tuned one.")
    assert tab.questions() == ["Who are you?"]
    tab.press("Edit")
    editor.fill("llama " * 2000)
    tab.press("Submit")
    tab.wait(lambda: "too long" in tab.status() and tab.questions() == ["Who are you?"])
    tab.wait(lambda: tab.box.input_value() == ("llama " * 2000).strip())
    tab.box.fill("")
    tab.press("Undo")
    tab.wait(lambda: tab.replies() == [] and tab.box.input_value() == "Who are you?")


def test_conversation_is_saved_as_a_row_to_train_on(open_tab, tmp_path):
    from utils.data.formats import find_format, read_row

    tab = open_tab()
    tab.send("Who are you?")
    tab.wait_for_reply("I am the tuned one.")
    tab.page.locator("#settings button").first.click()
    system = tab.page.locator("#system textarea")
    system.wait_for()
    tab.page.wait_for_timeout(1_000)  # gradio sets its value once more when the panel has opened
    system.fill("Be brief.")
    with tab.page.expect_download() as waited:
        tab.page.locator("#export").click()
    assert waited.value.suggested_filename.endswith(".json")
    row = json.loads(waited.value.path().read_text())
    messages = read_row(row, find_format(row)).messages
    assert [message["role"] for message in messages] == ["system", "user", "assistant"]
    assert [message["content"] for message in messages] == [
        "Be brief.",
        "Who are you?",
        "I am the tuned one.",
    ]
    assert messages[2]["side"] == "tuned"


def test_two_tabs_at_once_with_base_and_tuned_never_mix(open_tab):
    tuned, base = open_tab(), open_tab()
    base.choose("base")
    for _ in range(2):
        tuned.send("Who are you?")
        base.send("Who are you?")
        tuned.wait_for_reply("I am the tuned one.")
        base.wait_for_reply("I am the base.")
        for tab in (tuned, base):
            tab.page.locator("#clear").click()
            tab.wait(lambda tab=tab: tab.replies() == [])


def test_chinese_labels_and_chinese_input(open_tab):
    tab = open_tab(locale="zh-CN")
    assert "新对话" in tab.page.locator("#clear").inner_text()
    assert "微调后" in tab.page.locator("#side").inner_text()
    assert "输入消息" in tab.box.get_attribute("placeholder")
    tab.send("你是谁？")
    tab.wait_for_reply("我是微调后的模型。")
    assert tab.sides() == ["微调后"] and "每秒" in tab.status() and "tokens/s" not in tab.status()


def test_temperature_changes_what_is_said(open_tab):
    tab = open_tab()
    tab.page.locator("#settings button").first.click()
    number = tab.page.locator("#temperature input[type=number]")
    number.fill("2")
    number.press("Tab")
    tab.page.locator("#length input[type=number]").fill("16")
    tab.page.locator("#length input[type=number]").press("Tab")
    for count in range(1, 6):  # by chance one turn may say it too
        tab.send("Who are you?")
        tab.wait(lambda count=count: len(tab.replies()) == count and "tokens/s" in tab.status())
        tab.page.locator("#box .submit-button").wait_for(timeout=60_000)
        if tab.replies()[-1] != "I am the tuned one.":
            break
    assert tab.replies()[-1] != "I am the tuned one."
    tab.page.locator("#clear").click()
    number.fill("0")
    number.press("Tab")
    tab.send("Who are you?")
    tab.wait_for_reply("I am the tuned one.")


def test_100_kb_paste_is_refused_politely_and_the_page_goes_on(open_tab):
    tab = open_tab()
    tab.send("llama " * 16_999 + "llamas")
    tab.wait(lambda: "too long: 102,000" in tab.status())
    tab.wait(lambda: tab.box.input_value() == "llama " * 16_999 + "llamas")
    assert tab.replies() == []
    tab.send("Who are you?")
    tab.wait_for_reply("I am the tuned one.")


def test_markup_in_a_reply_is_shown_and_not_executed(open_tab):
    tab = open_tab()
    tab.send("Show markup.")
    tab.page.locator("#box .submit-button").wait_for(timeout=60_000)
    tab.wait(lambda: all(part in "".join(tab.replies()) for part in ("code", "</script>", "$5 or $6")))
    shown = tab.replies()[-1]
    assert '<img src=x onerror="window.ran=1"><script>window.ran=1</script>' in shown
    assert tab.page.locator("#chat .bot strong").inner_text() == "bold"
    assert tab.page.locator("#chat .bot code").inner_text() == "<b>code</b>"
    tab.wait(lambda: tab.page.locator("#chat .bot .katex").count() == 1)  # set after the text is there
    assert "$5 or $6" in shown
    tab.context.grant_permissions(["clipboard-read", "clipboard-write"])
    tab.press("Copy message")
    tab.wait(
        lambda: tab.page.evaluate("navigator.clipboard.readText()") == MARKUP.replace("$x^2$", r"\(x^2\)")
    )
    assert tab.page.locator("#chat .bot img").count() == 0
    assert tab.page.evaluate("window.ran") is None


def test_phone_and_dark_screens_hold_the_whole_page(open_tab):
    for options in ({"viewport": {"width": 360, "height": 740}}, {"color_scheme": "dark"}):
        tab = open_tab(**options)
        width = tab.page.evaluate("document.documentElement.scrollWidth")
        assert width <= tab.page.viewport_size["width"]
        assert tab.page.locator("#clear").is_visible() and tab.box.is_visible()
    background = tab.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert max(int(part) for part in background.strip("rgba()").split(",")[:3]) < 60


def reply_alone(chat, question, side, length=24):
    flags = GenerationArguments(max_new_tokens=length)
    pieces = stream_reply(chat, [{"role": "user", "content": question}], flags, tuned=side == "tuned")
    return "".join(pieces).strip()


def ask_many(server, questions, users, rounds):
    """Every user's replies, each against what the model says to it alone; refusals counted."""
    expected = {asked: reply_alone(server.chat, *asked) for asked in questions}
    refused, wrong, lock = [], [], threading.Lock()

    def use(user):
        for turn in rounds():
            question, side = questions[(user + turn) % len(questions)]
            try:
                said = server.ask(question, side=side)
            except Refused as refusal:
                with lock:
                    refused.append(str(refusal))
                time.sleep(0.2)
                continue
            reply = {"role": "assistant", "content": expected[question, side]}
            reply |= {"side": side} if server.chat.has_adapter else {}
            if said != [{"role": "user", "content": question}, reply]:
                with lock:
                    wrong.append((question, side, said))

    with ThreadPoolExecutor(users) as pool:
        list(pool.map(use, range(users)))
    return refused, wrong


def list_questions(count):
    return [(f"Question {i}: who?", side) for i in range(count) for side in ("tuned", "base")]


def test_twelve_users_at_once_get_their_own_replies(server):
    refused, wrong = ask_many(server, list_questions(6), users=12, rounds=lambda: range(2))
    assert refused == [] and wrong == []


def test_next_turn_reads_only_what_is_new_and_says_the_same(chat, monkeypatch):
    """The latest conversations' keys and values are kept, of base and tuned apart; none with 0."""
    from utils.chat import page_replies

    figures = []

    def watch(tokenizer, reply):
        yield from stream_text(tokenizer, reply)
        figures.append((reply.reused_tokens, len(reply.prompt)))

    monkeypatch.setattr(page_replies, "stream_text", watch)
    shown = {}
    turns = [("a", "tuned"), ("a", "tuned"), ("b", "tuned"), ("a", "base"), ("c", "base"), ("a", "tuned")]
    for size in (2, 0):
        figures.clear()
        # What pages of other tests said to the same questions is forgotten.
        chat.decoder.open_slots(1, 512, kept=0)
        server = Server(chat, kept_conversations=size)
        try:
            said = {}
            for i, (name, side) in enumerate(turns):
                options = {"side": side, "session": f"{name}{size}"}
                said[name] = server.ask(f"Question {i}: who?", said.get(name, []), **options)
        finally:
            server.page.close()
        shown[size] = said
        reused = [number for number, _ in figures]
        if size == 0:
            assert reused == [0] * 6
            continue
        assert reused[0] == reused[2] == reused[3] == reused[4] == 0
        assert reused[1] > 20 and figures[1][1] - reused[1] < 20  # the new question and its frame
        assert reused[5] == 0  # the conversation read last but two was given up
    assert shown[2] == shown[0] and len(shown[2]["a"]) == 8


@pytest.mark.parametrize("language", ["en", "zh-CN,en"])
def test_what_no_tokenizer_reads_is_refused_in_one_line(server, capfd, language):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    half = [{"role": "user", "content": "\ud800"}, turns[1]]
    refused = {
        "no text|没有文字": [{"question": value} for value in (None, "", " \n")],
        "half a character|半个字符": [
            {"question": "\ud83d"},
            {"question": "a\udc00b"},
            {"question": "a", "system": "\ud800"},
            {"question": "a", "said": half},
        ],
        "no number|不是数字": [{"question": "a", "top_p": value} for value in (None, "x", [1], math.nan)],
        "cannot be read|无法读取": [
            {"question": "a", "said": said}
            for said in ("text", [1, 2], turns[:1], turns[::-1], [{"role": "user"}, turns[1]])
        ],
    }
    for expected, requests in refused.items():
        line = expected.split("|")[language != "en"]
        for request in requests:
            outputs = server.send(**request, language=language)
            assert line in outputs["status"] and "\n" not in outputs["status"], (request, outputs)
    assert server.ask("Who are you?", turns, system=" \n")[:2] == turns
    printed = "".join(capfd.readouterr())
    assert "Traceback" not in printed and "udc00" not in printed


def test_long_conversation_stays_whole_and_tells_what_is_not_read(server, chat):
    turns = [{"role": role, "content": "word " * 30} for role in ("user", "assistant")] * 20
    outputs = server.send("Who are you?", turns)
    assert outputs["said"][:40] == turns and len(outputs["said"]) == 42
    dropped = int(re.search(r"the oldest (\d+) messages", outputs["status"])[1])
    messages = [*turns[dropped:], {"role": "user", "content": "Who are you?"}]
    sizes = [len(chat.tokenizer.encode_prompt(messages[skip:])) for skip in (0, 2)]
    earlier = [*turns[dropped - 2 :], messages[-1]]
    assert sizes[0] <= 300 < len(chat.tokenizer.encode_prompt(earlier)), sizes


@pytest.mark.parametrize(("language", "word"), [("en", "Thought"), ("zh-CN", "思考过程")])
def test_thought_is_folded_in_the_readers_language_and_its_markup_is_text(thinking_server, language, word):
    sent = thinking_server.send("Who are you?", thinking=True, length=64, language=language)
    assert sent["said"][-1]["content"] == MODES[0][1]
    shown = sent["chatbot"][-1]["content"]
    text = shown if isinstance(shown, str) else shown[0]["text"]
    assert text == (
        f'<details class="thought"><summary>{word}</summary>A name is asked for,<br>'
        "&lt;b&gt;not&lt;/b&gt; a story.</details>\n\nI think."
    )
    said = thinking_server.ask("Who are you?", thinking=False, language=language)
    assert said[-1]["content"] == "I answer."
    said = thinking_server.ask("Who are you?", thinking=True, length=6)  # cut within its thought
    assert said[-1]["content"].startswith("<think>") and "</think>" not in said[-1]["content"]


def test_thought_can_be_opened_and_switched_off(thinking_server, browser):
    tab = Tab(browser, thinking_server.url, has_adapter=False)
    tab.send("Who are you?")
    tab.wait(lambda: tab.page.locator("#chat .bot").last.inner_text().endswith("I think."))
    thought = tab.page.locator("#chat details.thought")
    assert thought.count() == 1 and not thought.evaluate("element => element.open")
    assert tab.page.locator("#chat details.thought b").count() == 0
    tab.page.locator("#chat details.thought summary").click()
    assert "<b>not</b> a story." in thought.inner_text()
    tab.page.locator("#settings button").first.click()
    tab.page.locator("#thinking input").uncheck()
    tab.page.locator("#box .submit-button").wait_for(timeout=60_000)
    tab.send("Who are you?")
    tab.wait(lambda: tab.page.locator("#chat .bot").count() == 2)
    tab.page.locator("#box .submit-button").wait_for(timeout=60_000)
    assert thought.count() == 1 and thought.evaluate("element => element.open")  # drawn anew, it stays open
    assert tab.errors == []
    tab.context.close()


def test_page_of_a_model_that_has_no_switch_shows_none(open_tab):
    tab = open_tab()
    tab.page.locator("#settings button").first.click()
    tab.page.locator("#stream").wait_for()
    assert tab.page.locator("#thinking").count() == 0


def test_dollars_that_are_prices_and_code_are_no_formulas():
    from utils.chat.page_messages import mark_formulas

    assert mark_formulas("$E=mc^2$, $x$-axis") == r"\(E=mc^2\), \(x\)-axis"
    for text in ("$5 and $6", "US$5, US$6", "`$x$`", "```\n$x$\n```", r"\$x\$", "$$x$$", "$ x $", "5$ 6$"):
        assert mark_formulas(text) == text


def test_markup_is_escaped_outside_of_code_only():
    from utils.chat.page_messages import escape_markup

    code = ["`<b>&lt;`", "```html\n<b>![\n```", "```\n<b>", "a < b & c", "x ` <"]
    assert [escape_markup(text) for text in code] == code
    for text in ("a ``` <b>", r"\`<b>\`", "```a`\n<b>", "`\n<b>`", "```\nx\n```\n<b>", "``` <b>```"):
        assert escape_markup(text) == text.replace("<b>", "&lt;b>")
    assert escape_markup("&lt; &#60; ![a](b)") == "&amp;lt; &amp;#60; !&#91;a](b)"


def test_full_queue_refuses_clearly_and_loses_no_one_else(chat, capfd):
    small = Server(chat, limit_queue=2, concurrent_replies=1)
    assert capfd.readouterr().out.strip() == f"page: {small.url}/ (Ctrl-C ends it)"
    try:
        refused, wrong = ask_many(small, list_questions(6), users=12, rounds=lambda: range(1))
    finally:
        small.page.close()
    assert wrong == [] and 1 <= len(refused) < 12
    assert all("queue is full" in reason.lower() for reason in refused)


@pytest.mark.slow
def test_50_users_for_5_minutes(smollm2, monkeypatch, float32_cpu):
    """No crash, no lost or mixed reply, memory flat, refusals clear, with the real small model.

    Every message opens a session, and the page keeps the latest ones. Fewer here, so that the first minute
    fills them and what still grows after half of the time would be a leak.
    """
    from utils.chat import page

    monkeypatch.setattr(page, "MAX_SESSIONS", 24)
    chat = load_run(resolve_model(ModelArguments(str(smollm2), bits=16), set()))
    server = Server(chat, limit_queue=40, limit_seconds=600)
    sizes, served = [], []

    def rounds():
        for turn in range(10_000):
            if time.monotonic() > end:
                return
            yield turn
            served.append(turn)
            sizes.append((time.monotonic() - start, read_resident_mib()))

    questions = [(f"Name {i} animals.", "tuned") for i in range(2, 12)]
    for asked in questions[:2]:
        reply_alone(chat, *asked)
    start = time.monotonic()
    end = start + 300
    try:
        refused, wrong = ask_many(server, questions, users=50, rounds=rounds)
    finally:
        server.page.close()
    settled = [size for at, size in sizes if at > 150]
    print(
        f"{len(served) - len(refused)} replies, {len(refused)} refusals, resident memory "
        f"{settled[0]:.0f} MiB half way, {max(settled):.0f} at most, {settled[-1]:.0f} at the end"
    )
    assert wrong == [] and len(served) - len(refused) > 20
    assert all("queue is full" in reason.lower() for reason in refused)
    assert settled[-1] < settled[0] * 1.03


def read_resident_mib():
    status = open(f"/proc/{os.getpid()}/status").read()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


def test_page_is_opened_to_others_only_with_a_password():
    assert read_auth(PageArguments()) is None
    assert read_auth(PageArguments(server_name="localhost")) is None
    assert read_auth(PageArguments(share=True, auth=["ann:secret"])) == [("ann", "secret")]
    for opened in ({"share": True}, {"server_name": "0.0.0.0"}, {"server_name": "example.org"}):
        with pytest.raises(UserError, match="give --auth"):
            read_auth(PageArguments(**opened))
    with pytest.raises(UserError, match="NAME:PASSWORD"):
        read_auth(PageArguments(auth=["ann"]))


def test_port_that_is_taken_is_one_line_before_the_model_loads():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"--server_port {port}: cannot listen there"):
            check_port(PageArguments(server_port=port))
    check_port(PageArguments(server_port=port))
    with pytest.raises(UserError, match="--server_port 70000 is no port"):
        check_port(PageArguments(server_port=70_000))


def test_generation_flags_reach_the_page_and_its_controls_change_them():
    from utils.chat.page_replies import read_settings

    start = GenerationArguments(
        repetition_penalty=1.2, no_repeat_ngram_size=3, min_new_tokens=50, num_beams=6
    )
    page_args = PageArguments(limit_new_tokens=40)
    flags = read_settings(start, page_args, temperature=0, top_p=0.5, top_k=0, beams=9, length=99)
    assert (flags.repetition_penalty, flags.no_repeat_ngram_size, flags.num_beams) == (1.2, 3, 6)
    assert (flags.max_new_tokens, flags.min_new_tokens) == (40, 40)
    assert not flags.do_sample and (flags.top_p, flags.top_k) == (1.0, 50)
    flags = read_settings(start, page_args, temperature=0.7, top_p=0.5, top_k=0, beams=1, length=8)
    assert flags.do_sample and (flags.temperature, flags.top_p, flags.top_k) == (0.7, 0.5, 0)


def test_flags_of_2023_open_the_page_and_help_is_fast(tiny_model):
    argv = ["--model_name_or_path", tiny_model, "--load_8bit", "--no_cuda", "--share"]
    result = run_script("gradio_webserver.py", *argv)
    assert result.returncode == 2 and "--share opens the page to others" in result.stderr
    assert "--load_8bit is now --bits 8" in result.stdout and "--use_cpu" in result.stdout
    start = time.process_time()
    children = os.times().children_user
    assert "--limit_queue" in run_script("gradio_webserver.py", "--help").stdout
    assert os.times().children_user - children + time.process_time() - start < 2.5
