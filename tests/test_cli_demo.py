"""The terminal chat as a person uses it: in a pseudo-terminal, with keys, pastes and interrupts."""

import io
import json
import os
import pty
import select
import signal
import sys
import time

import pytest
from helpers import ROOT
from helpers.shell import run_script

import cli_demo
from utils.chat.side_by_side import measure_width, stream_side_by_side, wrap_text
from utils.chat.streaming import decode_pieces
from utils.console import UserError
from utils.models.tokenizer import ChatTokenizer

PASTE = "\x1b[200~{}\x1b[201~"


class Terminal:
    """cli_demo.py in a pseudo-terminal of 100 columns."""

    def __init__(self, *argv):
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.chdir(ROOT)
            os.environ |= {"TERM": "xterm", "COLUMNS": "100", "LANG": "C.UTF-8"}
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # a test run in the background would pass on SIG_IGN
            os.execv(sys.executable, [sys.executable, "cli_demo.py", *map(str, argv)])
        self.screen = ""

    def type(self, text):
        os.write(self.fd, text.encode())

    def wait_for(self, text, seconds=120):
        """What came up to `text`, which must appear; the screen is then read on from there."""
        end = time.monotonic() + seconds
        while text not in self.screen:
            ready, _, _ = select.select([self.fd], [], [], max(0, end - time.monotonic()))
            assert ready, f"waited for {text!r}, the screen shows {self.screen[-500:]!r}"
            try:
                self.screen += os.read(self.fd, 65536).decode(errors="replace")
            except OSError:  # the program has left
                assert text in self.screen, self.screen[-500:]
        before, _, self.screen = self.screen.partition(text)
        return before

    def exit_code(self):
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


@pytest.fixture(scope="module")
def terminal(smollm2):
    """One chat with the starter model that the tests of this module share."""
    chat = Terminal("--model_name_or_path", smollm2, "--bits", "16", "--max_new_tokens", "200")
    chat.wait_for("\n> ")
    yield chat
    os.kill(chat.pid, signal.SIGKILL)
    os.waitpid(chat.pid, 0)


def test_ctrl_c_before_the_first_word_ends_the_reply_and_not_the_chat(terminal):
    """The very first prompt takes longest: the template is compiled."""
    terminal.type("Tell me a story.\r")
    terminal.wait_for("\x1b[?2004l")  # the prompt has taken the line
    time.sleep(0.05)
    terminal.type("\x03")
    terminal.wait_for("[interrupted]", seconds=10)
    terminal.wait_for("\n> ")


def test_reply_appears_and_the_next_question_is_awaited(terminal):
    terminal.type("What is the capital of France?\r")
    assert "Paris" in terminal.wait_for("\n> ")


def test_ctrl_c_interrupts_the_reply_and_not_the_program(terminal):
    terminal.type("clear\r")
    terminal.wait_for("new conversation")
    terminal.wait_for("\n> ")
    terminal.type("Write a very long story about a llama.\r")
    terminal.wait_for("llama.")
    time.sleep(4)
    terminal.type("\x03")
    terminal.wait_for("[interrupted]", seconds=10)
    terminal.wait_for("\n> ")


def test_ctrl_c_at_the_prompt_says_how_to_leave(terminal):
    time.sleep(0.5)  # until the prompt listens
    terminal.type("\x03")
    terminal.wait_for("Ctrl-D leaves")
    terminal.wait_for("\n> ")


def test_chinese_and_a_paste_of_two_lines_are_one_question(terminal):
    terminal.type("clear\r")
    terminal.wait_for("new conversation")
    terminal.wait_for("\n> ")
    terminal.type(PASTE.format("翻译这两行：\n你好") + "\r")
    time.sleep(2)
    terminal.type("\x03")
    shown = terminal.wait_for("\n> ")
    assert "翻译这两行" in shown and "你好" in shown
    assert "> 你好" not in shown  # it was not taken as a question of its own


@pytest.mark.slow
def test_stop_leaves(smollm2, tiny_model):
    chat = Terminal("--model_name_or_path", tiny_model, "--max_new_tokens", "4")
    chat.wait_for("\n> ")
    chat.type("stop\r")
    assert chat.exit_code() == 0


@pytest.mark.slow
def test_ctrl_d_leaves(tiny_model):
    chat = Terminal("--model_name_or_path", tiny_model, "--max_new_tokens", "4")
    chat.wait_for("\n> ")
    chat.type("\x04")
    assert chat.exit_code() == 0


def test_questions_come_through_a_pipe(smollm2):
    argv = ["--model_name_or_path", smollm2, "--bits", "16", "--max_new_tokens", "12"]
    result = run_script(
        "cli_demo.py", *argv, stdin="What is the capital of France?\nclear\n你好\nstop\nnever asked\n"
    )
    assert result.returncode == 0
    assert "> What is the capital of France?\nThe capital of France is Paris" in result.stdout
    assert "new conversation\n> 你好\n" in result.stdout and "never asked" not in result.stdout


@pytest.mark.slow
def test_long_conversation_is_trimmed_with_a_notice(tiny_model):
    lines = "\n".join(["word " * 150] * 3)
    argv = ["--model_name_or_path", tiny_model, "--max_new_tokens", "100"]
    result = run_script("cli_demo.py", *argv, stdin=lines + "\n" + "word " * 600)
    assert result.returncode == 0, result.stderr
    assert "the oldest 2 messages are forgotten" in result.stdout
    assert "the model's context is 512" in result.stdout


@pytest.fixture
def say(call_main, monkeypatch):
    """What the chat prints when these lines come through a pipe."""

    def run(lines, *argv):
        monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines) + "\n"))
        return call_main("cli_demo", *argv)

    return run


def test_commands_change_system_message_regenerate_and_save(say, tiny_model, tmp_path):
    saved = tmp_path / "chat.jsonl"
    lines = ["/regenerate", "/system 你是诗人。", "Hello.", "/regenerate", f"/save {saved}", "/save", "/sing"]
    argv = ["--model_name_or_path", tiny_model, "--max_new_tokens", "4", "--system", "Be brief."]
    printed = say([*lines, "/help"], *argv)
    assert "there is no reply yet" in printed and "name the file" in printed
    assert "/sing is no command: /help lists them" in printed and "/save FILE    append" in printed
    (row,) = map(json.loads, saved.read_text(encoding="utf-8").splitlines())
    assert [message["role"] for message in row["messages"]] == ["system", "user", "assistant"]
    assert row["messages"][0]["content"] == "你是诗人。" and row["messages"][1]["content"] == "Hello."
    assert printed.count("4 tokens, ") == 2 and "tokens/s, cut by --max_new_tokens 4]" in printed


def test_question_that_is_no_utf8_is_one_line(tiny_model, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"/clear\ncaf\xe9\n")))
    sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")
    with pytest.raises(UserError, match="line 2 is not UTF-8"):
        cli_demo.hold_conversation(None, [], None, None)


def test_empty_conversation_is_not_saved(say, tiny_model, tmp_path):
    argv = ["--model_name_or_path", tiny_model, "--system", "Be brief."]
    assert "there is no reply yet" in say([f"/save {tmp_path / 'chat.jsonl'}"], *argv)
    assert not (tmp_path / "chat.jsonl").exists()


@pytest.mark.parametrize("word", ["exit", "quit", "stop", "/exit", "/quit"])
def test_word_that_leaves(tiny_model, word, capsys, monkeypatch):
    """Nothing behind it is asked."""
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"/clear\n{word}\nnever asked\n"))
    cli_demo.hold_conversation(None, [], None, None)
    assert capsys.readouterr().out == f"> /clear\nnew conversation\n> {word}\n"


def test_reply_asked_for_again_is_another_one(say, tiny_model, tmp_path):
    """The likeliest reply of the model would be the same: this one is sampled."""
    saved = tmp_path / "chat.jsonl"
    again = ["/regenerate", f"/save {saved}"] * 2
    printed = say(
        ["Hello.", f"/save {saved}", *again], "--model_name_or_path", tiny_model, "--max_new_tokens", "12"
    )
    assert printed.count("[sampled: the likeliest reply would be the same again]") == 2
    rows = [json.loads(line)["messages"] for line in saved.read_text(encoding="utf-8").splitlines()]
    assert len({row[-1]["content"] for row in rows}) == 3 and {len(row) for row in rows} == {2}


def test_ctrl_c_as_a_reply_is_opened_leaves_the_conversation_as_it_was(
    say, tiny_model, tmp_path, monkeypatch
):
    """Asked, or asked again; also where it ends as soon as it is open."""
    from utils.chat import streaming

    open_reply, opened, saved = streaming.open_reply, [], tmp_path / "chat.jsonl"

    def open_first_alone(*args):
        opened.append(open_reply(*args))
        if len(opened) in (2, 3):
            monkeypatch.setattr(streaming, "stream_text", lambda *_: reply_until_ctrl_c())  # of the fourth
            raise KeyboardInterrupt
        return opened[-1]

    monkeypatch.setattr(streaming, "open_reply", open_first_alone)
    lines = ["Hello.", "And you?", "/regenerate", "/regenerate", f"/save {saved}"]
    printed = say(lines, "--model_name_or_path", tiny_model, "--max_new_tokens", "4")
    assert printed.count(" [interrupted]\n") == 3 and len(opened) == 4
    (row,) = map(json.loads, saved.read_text(encoding="utf-8").splitlines())
    assert [message["role"] for message in row["messages"]] == ["user", "assistant"]
    assert row["messages"][0]["content"] == "Hello."


def reply_until_ctrl_c(*pieces):
    yield from pieces
    raise KeyboardInterrupt


def test_ctrl_c_keeps_what_both_replies_have_said(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    replies = cli_demo.print_replies(
        [(piece for piece in ("I am ", "the base", " model")), reply_until_ctrl_c("I am ", "Gua")]
    )
    assert replies == ["I am the base model", "I am Gua"]
    printed = capsys.readouterr().out
    assert split_row(printed.splitlines()[1]) == ("I am the base", "I am Gua")
    assert "model" in printed.splitlines()[2] and printed.endswith(" [interrupted]\n")
    assert cli_demo.print_replies([reply_until_ctrl_c("Once ", "upon")]) == ["Once upon"]
    assert capsys.readouterr().out == "Once upon [interrupted]\n"


def test_cut_reply_ends_with_a_whole_character(smol_tokenizer):
    """A reply cut by --max_new_tokens may end amid the bytes of a Chinese character."""
    stop, text = smol_tokenizer.eos_token_id, "我是原驼🦙"
    ids = smol_tokenizer(text).input_ids
    tokenizer = ChatTokenizer(smol_tokenizer, [stop])
    for length in range(1, len(ids) + 1):
        shown = tokenizer.decode_reply(ids[:length])
        assert "".join(decode_pieces(tokenizer, ids[:length])) == shown and text.startswith(shown)
    assert shown == text
    assert tokenizer.decode_reply([*smol_tokenizer("a�").input_ids, stop]) == "a�"  # its own


@pytest.mark.slow
def test_compare_shows_base_and_tuned_in_two_columns(tiny_model, tmp_path):
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    base = ["--model_name_or_path", tiny_model, "--bits", "32", "--max_new_tokens", "12"]
    tuned = [*base, "--checkpoint_dir", tmp_path / "adapter"]
    alone = [reply_words(run_script("cli_demo.py", *argv, stdin="Hello.\n")) for argv in (base, tuned)]
    together = run_script("cli_demo.py", *tuned, "--compare", stdin="Hello.\n", COLUMNS="90")
    assert together.returncode == 0, together.stderr
    rows = [split_row(line) for line in together.stdout.splitlines() if " |" in line]
    assert list(rows[0]) == ["base", "tuned"]
    columns = ["".join(row[side] for row in rows[1:]).replace(" ", "") for side in (0, 1)]
    assert columns == alone and alone[0] != alone[1]


def split_row(row):
    left, _, right = row.partition(" |")
    return left.strip(), right.strip()


def reply_words(result):
    assert result.returncode == 0, result.stderr
    return result.stdout.split("> Hello.\n")[1].strip().replace(" ", "").replace("\n", "")


def test_compare_without_an_adapter_is_refused_before_loading(call_main, tiny_model):
    with pytest.raises(UserError, match="name one with --checkpoint_dir"):
        call_main("cli_demo", "--model_name_or_path", tiny_model, "--compare")


def test_columns_keep_their_width_with_chinese_text():
    text = "我是 Guanaco，由 Chinese-Guanaco 项目微调的语言模型。 averyveryveryverylongword"
    lines = wrap_text(text, 20)
    assert max(measure_width(line) for line in lines) <= 20
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    rows = list(stream_side_by_side([("你好", "a"), ("世界" * 20, " b"), ("", " c")], 43))
    assert "".join(split_row(row)[0] for row in rows) == "你好" + "世界" * 20
    assert [split_row(row)[1] for row in rows if split_row(row)[1]] == ["a b c"]
