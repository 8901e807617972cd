"""The judge against a real HTTP server that is slow, full, broken, or talks nonsense; killed and restarted."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from helpers import ROOT

from eval.answers.questions import load_answers, load_questions
from eval.answers.reviews import count_results, load_matches, relate_scores
from eval.judge import estimate_tokens, parse_score
from utils.console import UserError

PREFERRED = "better"  # the answers of one player hold this word
QUESTIONS = 10


class Endpoint:
    """An OpenAI-compatible server that prefers the answer with the word `better`, once `troubles` are over.

    `troubles`: {question: behaviours for its first requests}. `hold_after`: later requests wait for `release`.
    """

    def __init__(self, scoring="threeclass"):
        self.scoring, self.troubles, self.hold_after = scoring, {}, None
        self.asked, self.release, self.lock = [], threading.Event(), threading.Lock()
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                endpoint.answer(self, body)

            def log_message(self, *arguments):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def answer(self, handler, body):
        prompt = body["messages"][0]["content"]
        question = prompt.split("\n")[1]
        first, second = prompt.split("[Answer of Assistant 2]")
        with self.lock:
            self.asked.append((question, PREFERRED in first))
            place = len(self.asked)
            trouble = self.troubles.get(question, []).pop(0) if self.troubles.get(question) else None
        if self.hold_after is not None and place > self.hold_after:
            self.release.wait(20)
        if trouble == "slow":
            time.sleep(3)
        if isinstance(trouble, int):
            return self.send(handler, trouble, {"error": {"message": f"trouble {trouble}"}})
        text = self.judge(PREFERRED in first) if trouble in (None, "slow") else trouble
        if trouble == "no JSON":
            return self.send(handler, 200, "<html>busy</html>")
        usage = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
        message = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
        self.send(
            handler,
            200,
            {
                "id": "1",
                "object": "chat.completion",
                "created": 1,
                "model": "j",
                "choices": [message],
                "usage": usage,
            },
        )

    def judge(self, first_is_better):
        if self.scoring == "relative":
            return "9 6\nClear." if first_is_better else "6 9\nClear."
        return f"One of them is right.\n\n{1 if first_is_better else 2}"

    def send(self, handler, status, content):
        payload = (content if isinstance(content, str) else json.dumps(content)).encode()
        try:
            handler.send_response(status)
            handler.send_header(
                "Content-Type", "text/html" if isinstance(content, str) else "application/json"
            )
            handler.send_header("Content-Length", str(len(payload)))
            handler.end_headers()
            handler.wfile.write(payload)
        except (BrokenPipeError, ConnectionResetError):
            pass  # the client gave up or was killed


@pytest.fixture
def endpoint(monkeypatch):
    endpoint = Endpoint()
    monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{endpoint.server.server_port}/v1")
    monkeypatch.setenv("OPENAI_API_KEY", "any")
    yield endpoint
    endpoint.release.set()
    endpoint.server.shutdown()


@pytest.fixture
def argv(tmp_path):
    questions = [
        {"question_id": i, "text": f"Question {i}?", "category": "generic"} for i in range(QUESTIONS)
    ]
    tuned = [{"question_id": i, "generation": f"a {PREFERRED} answer to {i}"} for i in range(QUESTIONS)]
    base = [{"question_id": i, "text": f"an answer to {i}", "answer_id": f"b{i}"} for i in range(QUESTIONS)]
    files = []
    for name, rows in (("questions", questions), ("answer-tuned", tuned), ("answer-base", base)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
        files.append(tmp_path / f"{name}.jsonl")
    argv = [
        files[1],
        files[2],
        "--questions",
        files[0],
        "--model",
        "judge-1",
        "--output_dir",
        tmp_path / "out",
    ]
    return [str(word) for word in argv]


def read_files(tmp_path):
    return sorted(str(path) for path in (tmp_path / "out").iterdir())


def test_every_pair_is_judged_in_both_orders_and_elo_reads_the_files(endpoint, argv, tmp_path, call_main):
    printed = call_main("eval.judge", *argv)
    files = read_files(tmp_path)
    assert [os.path.basename(file) for file in files] == [
        "answer-base-vs-answer-tuned-judge_1-reviewer-threeclass.jsonl",
        "answer-tuned-vs-answer-base-judge_1-reviewer-threeclass.jsonl",
    ]
    assert count_results(load_matches(files)) == {
        "base": {"wins": 0, "ties": 0, "losses": 20},
        "tuned": {"wins": 20, "ties": 0, "losses": 0},
    }
    assert Counter(endpoint.asked) == Counter(
        (f"Question {i}?", first) for i in range(10) for first in (True, False)
    )
    row = json.loads(open(files[1]).readline())
    assert list(row) == [
        "review_id", "question_id", "answer1_id", "answer2_id", "reviewer_id", "metadata", "text", "score",
    ]  # fmt: skip
    assert row["text"].endswith("\n\n1") and row["score"] == 1
    assert "20 of 20 reviews to ask for" in printed and "used 2,000 tokens in, 200 out" in printed
    assert "0 of 20 reviews to ask for" in call_main("eval.judge", *argv)
    assert len(endpoint.asked) == 20


def test_score_relative_reviews_give_a_share(endpoint, argv, tmp_path, call_main):
    endpoint.scoring = "relative"
    call_main("eval.judge", *argv, "--scoring", "relative", "--max_questions", "4")
    matches = load_matches(read_files(tmp_path))
    assert len(matches) == 8 and set(relate_scores(matches).values()) <= {9 / 6, 6 / 9}
    assert {match.scores for match in matches} == {(9.0, 6.0), (6.0, 9.0)}


def test_full_broken_slow_and_nonsensical_server_is_asked_again(endpoint, argv, tmp_path, call_main):
    endpoint.troubles = {
        "Question 0?": [429],
        "Question 1?": [500, 503],
        "Question 2?": ["slow"],
        "Question 3?": ["I like both!"],
        "Question 4?": ["no JSON"],
        "Question 5?": [""],
    }
    call_main("eval.judge", *argv, "--timeout_s", "1", "--parallel", "8")
    counts = count_results(load_matches(read_files(tmp_path)))
    assert counts["tuned"] == {"wins": 20, "ties": 0, "losses": 0}
    times = Counter(question for question, _ in endpoint.asked)
    assert [times[f"Question {i}?"] for i in range(7)] == [3, 4, 3, 3, 3, 3, 2]


def test_question_without_verdict_is_named_and_asked_again_at_the_next_start(
    endpoint, argv, tmp_path, call_main, capsys
):
    endpoint.troubles = {"Question 7?": ["The first.", "Surely the first.", "Well, the first."] * 2}
    with pytest.raises(UserError, match="2 reviews failed, the first: question 7: .*no verdict in 3 replies"):
        call_main("eval.judge", *argv, "--parallel", "1")
    # 18 replies with a verdict, and six without: 100 tokens in and 10 out each
    assert "used 2,400 tokens in, 240 out" in capsys.readouterr().out
    assert len(load_matches(read_files(tmp_path))) == 18
    before = len(endpoint.asked)
    assert "2 of 20 reviews to ask for" in call_main("eval.judge", *argv)
    assert len(load_matches(read_files(tmp_path))) == 20 and len(endpoint.asked) == before + 2


def test_wrong_key_and_dead_endpoint_stop_with_one_line(endpoint, argv, call_main, monkeypatch):
    endpoint.troubles = {f"Question {i}?": [401, 401] for i in range(10)}
    with pytest.raises(UserError, match="the endpoint refuses .*401"):
        call_main("eval.judge", *argv)
    endpoint.troubles = {f"Question {i}?": [500] * 99 for i in range(10)}
    with pytest.raises(UserError, match=r"\d reviews in a row failed"):
        call_main("eval.judge", *argv, "--retries", "0")
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(UserError, match="OPENAI_API_KEY is not set"):
        call_main("eval.judge", *argv)


@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGTERM])
def test_judge_killed_half_way_and_restarted_asks_nothing_twice(endpoint, argv, tmp_path, kind):
    """Killed outright, only the request under way, whose reply nobody got, is asked again; else nothing is."""
    endpoint.hold_after = 9
    command = [sys.executable, "-m", "eval.judge", *argv, "--parallel", "1"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + 60
    while len(endpoint.asked) < 10 and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(kind)
    time.sleep(0.3)
    endpoint.hold_after = None
    endpoint.release.set()
    assert process.wait(30) == (130 if kind == signal.SIGTERM else -signal.SIGKILL)
    lost = set(endpoint.asked[9:]) if kind == signal.SIGKILL else set()
    assert len(load_matches(read_files(tmp_path))) == 10 - len(lost)
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0 and f"{10 + len(lost)} of 20 reviews to ask for" in result.stdout
    times = Counter(endpoint.asked)
    assert len(times) == 20 and {key for key, count in times.items() if count > 1} == lost
    assert len(load_matches(read_files(tmp_path))) == 20


def test_half_a_line_left_by_a_crash_is_asked_again(endpoint, argv, tmp_path, call_main):
    call_main("eval.judge", *argv)
    path = read_files(tmp_path)[0]
    text = open(path).read()
    open(path, "w").write(text[:-30])
    printed = call_main("eval.judge", *argv)
    assert "half a review" in printed and "1 of 20 reviews to ask for" in printed
    assert len(load_matches(read_files(tmp_path))) == 20


def test_review_with_other_ends_of_lines_is_read_back(endpoint, argv, tmp_path, call_main):
    call_main("eval.judge", *argv)
    path = Path(read_files(tmp_path)[0])
    first, *rest = path.read_text(encoding="utf-8").split("\n")
    row = json.loads(first) | {"text": "one\u2028two\x85three"}
    path.write_text("\n".join([json.dumps(row, ensure_ascii=False), *rest]), encoding="utf-8")
    assert "0 of 20 reviews to ask for" in call_main("eval.judge", *argv)
    assert len(load_matches(read_files(tmp_path))) == 20


def test_changed_answer_is_judged_anew(endpoint, argv, tmp_path, call_main):
    call_main("eval.judge", *argv)
    path = tmp_path / "answer-tuned.jsonl"
    path.write_text(path.read_text().replace("answer to 3", "reply to 3"))
    assert "2 of 20 reviews to ask for" in call_main("eval.judge", *argv, "--estimate_only")


def test_cost_is_estimated_before_anything_is_sent(endpoint, argv, call_main):
    printed = call_main("eval.judge", *argv, "--estimate_only", "--price_in", "2.5", "--price_out", "10")
    assert "20 of 20 reviews" in printed and ", about 0.0" in printed and not endpoint.asked
    assert estimate_tokens("四位量化" * 10) == 40 and estimate_tokens("four bit " * 40) == 90


def test_missing_answers_and_files_of_one_name_are_refused(argv, tmp_path, call_main):
    with pytest.raises(UserError, match="two files are called tuned"):
        call_main("eval.judge", argv[0], argv[0], *argv[2:])
    lines = (tmp_path / "answer-tuned.jsonl").read_text().splitlines()
    (tmp_path / "answer-tuned.jsonl").write_text("\n".join(lines[:4]))
    with pytest.raises(UserError, match="tuned: 6 of 10 questions have no answer, the first is 4"):
        call_main("eval.judge", *argv)
    with pytest.raises(UserError, match="--answers: two or more"):
        call_main("eval.judge", argv[0], *argv[2:])


@pytest.mark.parametrize(
    "text, scoring, score",
    [
        ("Both fine.\n\n3", "threeclass", 3), ("I choose:\n**2**", "threeclass", 2), ("1.\n", "threeclass", 1),
        ("2 is better\nthan 1", "threeclass", None), ("4", "threeclass", None), ("", "threeclass", None),
        ("8 9.5\nwhy", "relative", [8.0, 9.5]), ("**7, 10**", "relative", [7.0, 10.0]),
        ("11 3\n", "relative", None), ("good", "relative", None), ("8\n9", "relative", None),
    ],
)  # fmt: skip
def test_verdicts_are_read_where_they_were_asked_for(text, scoring, score):
    assert parse_score(text, scoring) == score


def test_vicuna_and_oasst_question_files_and_the_papers_answers_are_read(tmp_path):
    rows = [
        {"question_id": 1, "text": "How tall is it?", "category": "fermi"},
        {
            "question_id": "a38b",
            "text": "### Human: Hi ### Assistant: Hello. ### Human: Who? ### Assistant:",
            "input": "x",
            "output": "y",
        },
    ]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, rows)))
    plain, chat = load_questions([str(tmp_path / "q.jsonl")])
    assert plain.messages == [{"role": "user", "content": "How tall is it?"}] and plain.category == "fermi"
    assert chat.messages == [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "Who?"},
    ]
    with pytest.raises(UserError, match="question_id 1 is there twice"):
        load_questions([str(tmp_path / "q.jsonl")] * 2)
    baseline = {"question_id": 1, "text": "Tall.", "answer_id": "BZ", "model_id": "gpt-3.5", "metadata": {}}
    run = {"question_id": 2, "text": "How tall is it?", "prompt": "### Human", "generation": "Very."}
    (tmp_path / "a.jsonl").write_text(f"{json.dumps(baseline)}\n{json.dumps(run)}")
    answers = load_answers(str(tmp_path / "a.jsonl"))
    assert (answers[1].answer_id, answers[1].text, answers[2].text) == ("BZ", "Tall.", "Very.")


@pytest.mark.parametrize("text", ["### Human:", "### Human: a ### Assistant: b"])
def test_question_without_a_last_human_turn_is_one_line(tmp_path, text):
    path = tmp_path / "questions.jsonl"
    path.write_text(json.dumps({"question_id": 1, "text": text}) + "\n")
    with pytest.raises(UserError, match="row 1 is no question"):
        load_questions([str(path)])


def test_oasst_and_mt_bench_rows_and_cut_generations_are_read(tmp_path, capsys):
    questions = [
        {"message_id": "m1", "text": "### Human: Why? ### Assistant:", "category": "generic"},
        {"question_id": 81, "category": "writing", "turns": ["Write a line.", "Now shorter."]},
    ]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, questions)))
    oasst, bench = load_questions([str(tmp_path / "q.jsonl")])
    assert oasst.question_id == "m1" and oasst.messages == [{"role": "user", "content": "Why?"}]
    assert bench.messages == [{"role": "user", "content": "Write a line."}]
    assert "1 of 2 have more than one turn: the first is asked" in capsys.readouterr().out
    rows = [
        {"message_id": "m1", "generation": "So. ### Human: And?", "generation_truncated": "So."},
        {"question_id": 81, "answer_id": "x", "choices": [{"index": 0, "turns": ["A line.", "Line."]}]},
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert [one.text for one in load_answers(str(tmp_path / "a.jsonl")).values()] == ["So.", "A line."]
