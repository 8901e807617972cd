"""A run on a thinking model: its mode is recorded, and chat, merging, servers and the report go by it."""

import io
import json
import shutil

import numpy as np
import pytest
from helpers.chats import train_rows
from helpers.runs import run_in_process
from helpers.thinking import CHANNELS, DROPS

import cli_demo
from utils.arguments import ModelArguments
from utils.chat.generation import load_run
from utils.data import tokenizing
from utils.data.formats import find_format, read_row
from utils.data.thoughts import describe_thoughts
from utils.models.folder import resolve_model
from utils.prompts.rendering import probe_style, split_thought
from utils.run.resume import find_changes, find_lasting_arguments

pytestmark = pytest.mark.usefixtures("own_cache")

ASKED = [{"role": "user", "content": "Who are you?"}]
FLAGS = "--max_steps 1 --model_max_length 200 --per_device_train_batch_size 2 --gradient_accumulation_steps 1".split()


@pytest.fixture(scope="module")
def base(tiny_model, tmp_path_factory):
    """The tiny model with a template that has a switch, on by default."""
    folder = shutil.copytree(tiny_model, tmp_path_factory.mktemp("thinking") / "base")
    (folder / "chat_template.jinja").write_text(DROPS)
    return folder


def write_mixture(path, with_thought, without):
    rows = [{"instruction": f"q{i}", "output": f"a{i}", "cot": "Let me think."} for i in range(with_thought)]
    rows += [{"instruction": f"p{i}", "output": f"b{i}"} for i in range(without)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def run(base, tmp_path_factory):
    """Trained on 2 rows with a thought and 10 without."""
    folder = tmp_path_factory.mktemp("run")
    data = write_mixture(folder / "rows.jsonl", 2, 10)
    argv = ["--model_name_or_path", base, "--dataset_name", data, "--output_dir", folder / "run", *FLAGS]
    run_in_process("qlora_finetune", *argv)
    return folder / "run"


def render(folder, **flags):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    return tokenizer.apply_chat_template(ASKED, add_generation_prompt=True, return_dict=False, **flags)


def test_mode_of_most_rows_is_recorded_and_a_servers_default(run, base):
    record = json.loads((run / "run.json").read_text())
    assert record["prompt"]["thinking"] == "off" and record["arguments"]["thinking"] == "auto"
    assert render(base) == render(base, enable_thinking=True) != render(base, enable_thinking=False)
    assert render(run) == render(base, enable_thinking=False)
    assert render(run, enable_thinking=True) == render(base, enable_thinking=True)


def test_chat_follows_the_run_and_its_flag_overrides_with_a_line(run, base, capsys):
    def prompt(**flags):
        resolved = resolve_model(ModelArguments(checkpoint_dir=str(run), **flags), set(flags))
        return load_run(resolved).tokenizer.encode_prompt(ASKED)

    assert prompt() == render(base, enable_thinking=False)
    assert "overrides" not in capsys.readouterr().out
    assert prompt(thinking="on") == render(base, enable_thinking=True)
    assert "--thinking on overrides the run's off" in capsys.readouterr().out


def test_merged_model_renders_the_trained_mode(run, base, tmp_path):
    argv = ["--checkpoint_dir", run, "--output_dir", tmp_path / "merged", "--no_parity"]
    run_in_process("utils.merge_adapter", *argv)
    assert render(tmp_path / "merged") == render(base, enable_thinking=False)
    merged = load_run(resolve_model(ModelArguments(str(tmp_path / "merged"), bits=16), set()))
    assert merged.tokenizer.encode_prompt(ASKED) == render(base, enable_thinking=False)


@pytest.mark.parametrize(
    ("switch", "on"), [(None, False), ({"enable_thinking": True}, True), ({"thinking": False}, False)]
)
def test_request_to_our_server_switches_thinking(run, base, switch, on):
    from utils.arguments import GenerationArguments
    from utils.chat.openai_form import ChatRequest
    from utils.chat.server import Server

    chat = load_run(resolve_model(ModelArguments(checkpoint_dir=str(run)), set()))
    chat.decoder.open_slots(1, 400, kept=0)
    server = Server(chat, {"mine": True}, GenerationArguments(max_new_tokens=1), 1, 400, 1, 60.0)
    asked = ChatRequest(model="mine", messages=ASKED, chat_template_kwargs=switch)
    reply = server.begin(asked, server.encode(asked))
    assert reply.prompt == render(base, enable_thinking=on)
    chat.decoder.end()


def test_slash_think_switches_in_the_terminal(run, base, capsys, monkeypatch):
    lines = ["/think", "/think on", "/think maybe", "/help"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    run_in_process("cli_demo", "--checkpoint_dir", run)
    printed = capsys.readouterr().out
    said = [line for line in printed.splitlines() if line.startswith(("thinking is", "/think maybe:"))]
    assert said == ["thinking is off", "thinking is on", "/think maybe: use on or off", "thinking is on"]
    assert "/think on|off" in printed.partition("> /help")[2]
    chat = load_run(resolve_model(ModelArguments(checkpoint_dir=str(run)), set()))
    assert cli_demo.switch_thinking(chat, "on").tokenizer.encode_prompt(ASKED) == render(
        base, enable_thinking=True
    )
    assert chat.tokenizer.encode_prompt(ASKED) == render(base, enable_thinking=False)


def test_template_without_a_switch_says_so(tiny_model, capsys):
    flags = {"bits": 16, "thinking": "off"}
    chat = load_run(resolve_model(ModelArguments(str(tiny_model), **flags), set(flags)))
    assert "--thinking off changes nothing: the chat template has no switch" in capsys.readouterr().out
    assert cli_demo.switch_thinking(chat, "on") is chat
    assert capsys.readouterr().out == "the chat template has no switch for thinking\n"


def test_thought_is_dim_in_a_terminal_and_tagged_in_a_pipe(monkeypatch):
    pieces = ["<think>", "\nhm", "</think>", "\n\nYes: ", "<think>"]
    assert list(cli_demo.dim_thought(pieces)) == pieces
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert "".join(cli_demo.dim_thought(pieces)) == "\033[2m\nhm\033[0m\n\nYes: <think>"
    assert "".join(cli_demo.dim_thought(pieces[:2])) == "\033[2m\nhm\033[0m"  # cut within it
    assert "".join(cli_demo.dim_thought(["Yes: ", "<think>"])) == "Yes: <think>"


@pytest.mark.parametrize(
    ("counts", "template", "mode", "said"),
    [
        ((2, 10), DROPS, "off", "only 17% of the rows have a thought: the model may stop thinking"),
        ((10, 2), DROPS, "on", "only 17% of the rows have no thought: with thinking off the model may think"),
        ((5, 5), DROPS, "on", None),
        ((9, 0), DROPS, "on", None),
        ((0, 9), DROPS, "off", "no row has a thought: thinking on is not trained here"),
        ((9, 1), CHANNELS, "on", "no switch for thinking and 10% of the rows have no thought"),
    ],
)  # fmt: skip
def test_report_warns_of_mixtures_that_unteach(counts, template, mode, said):
    found = {"counts": dict(zip((tokenizing.THOUGHT, tokenizing.NO_THOUGHT), counts, strict=True))}
    first, *more = describe_thoughts(found, probe_style(template), mode)
    assert first == f"thinking {mode} in this run's replies"
    assert (said is None and more == []) or said in more[0]


def test_report_counts_rows_with_and_without_thoughts(run, base, smol_tokenizer, tmp_path):
    report = json.loads((run / "data_report.json").read_text())
    findings = report["parts"]["train"]["findings"]
    assert findings[tokenizing.THOUGHT] == 2 and findings[tokenizing.NO_THOUGHT] == 10
    assert "may stop thinking" in report["thinking"][1]
    rows = [{"instruction": "q", "output": "<think>hm hm</think>a"}, {"instruction": "p", "output": "b"}]
    counts = train_rows(smol_tokenizer, tmp_path, rows)[
        1
    ]  # a template without thoughts: no word of those without
    assert counts == {tokenizing.THOUGHT: 1}
    assert describe_thoughts({"counts": counts}, probe_style(smol_tokenizer.chat_template), "auto") == [
        "the chat template knows no thoughts: 1 rows train theirs as <think> text (--thinking off leaves it out)"
    ]


def test_rows_bring_thoughts_in_every_known_way():
    thought = "Let me think of it."
    rows = [
        {"instruction": "q", "output": "a", "cot": thought},
        {"Question": "q", "Complex_CoT": thought, "Response": "a"},
        {"question": "q", "answer": "a", "reasoning": thought},
        {"input": "q", "output": f"<think>\n{thought}\n</think>\n\na"},
        {"messages": [ASKED[0], {"role": "assistant", "content": "a", "reasoning_content": thought}]},
        {
            "conversations": [
                {"from": "human", "value": "q"},
                {"from": "gpt", "value": f"<think>{thought}</think>a"},
            ]
        },
    ]
    for row in rows:
        answer = read_row(row, find_format(row)).messages[-1]
        assert split_thought(answer) == (thought, "a") and read_row(row, find_format(row)).unread == ()
    marked = read_row({"input": "q", "output": "a", "reasoning": "on"}, "input-output").messages[-1]
    assert split_thought(marked) == ("", "a")  # a mark and no thought


def test_thought_without_an_answer_leaves_the_row_out(smol_tokenizer, tmp_path):
    smol_tokenizer.chat_template = DROPS
    rows = [{"instruction": "q", "output": "<think>\nI was thin"}, {"instruction": "p", "output": "b"}]
    kept, counts = train_rows(smol_tokenizer, tmp_path, rows)
    assert len(kept) == 1 and counts["dropped: an answer is a thought alone, or one without an end"] == 1


def test_a_chat_of_thoughts_is_a_row_an_answer_and_is_counted(smol_tokenizer, tmp_path):
    smol_tokenizer.chat_template = DROPS
    answer = {"role": "assistant", "content": "a", "reasoning_content": "hm"}
    kept, counts = train_rows(smol_tokenizer, tmp_path, [{"messages": [ASKED[0], answer] * 3}])
    assert len(kept) == 3 and counts == {tokenizing.THOUGHT: 1, tokenizing.TURN_BY_TURN: 3}
    assert all(np.array(row["labels"]).max() > 0 for row in kept)


def test_runs_of_versions_without_the_flag_go_on(run):
    record = json.loads((run / "run.json").read_text())
    now = record["arguments"]
    was = {name: value for name, value in now.items() if name != "thinking"}
    assert find_changes(record | {"arguments": was}, {"arguments": now}) == []
    assert find_lasting_arguments(was) == find_lasting_arguments(now)
    changed = find_changes(record | {"arguments": was}, {"arguments": now | {"thinking": "off"}})
    assert changed == ["--thinking None -> off"]
