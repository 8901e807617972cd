"""Many clients at a server that speaks OpenAI's API: is every reply the right one, and how long does it take?

    python -m utils.serve --checkpoint_dir RUN
    python -m eval.serve_load --model RUN --clients 64 --seconds 120

First one client asks every prompt alone, greedily. Then all ask together, and some hang up in the middle of
their reply. Each reply, and each part of one, must be what the client alone was told; refusals must be 429.
"""

import asyncio
import json
import random
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from utils.arguments import flag, require_positive
from utils.console import UserError, notice, run_main
from utils.flags.parser import parse_args
from utils.run.repository import REPOSITORY

QUESTIONS = REPOSITORY / "eval" / "prompts" / "questions_en.jsonl"


@dataclass
class LoadArguments:
    _argument_group_name = "load"
    url: str = flag("http://127.0.0.1:8000/v1", "Address of the server.")
    model: str | None = flag(None, "Name of the model there; default: the first of /v1/models.")
    api_key: str = flag("none", "Its key.")
    clients: int = flag(64, "Clients at once.")
    seconds: float = flag(120.0, "Time that they go on asking.")
    prompts: int = flag(16, "Different prompts.")
    prompt_tokens: int = flag(128, "Tokens of a prompt, about.")
    reply_tokens: int = flag(128, "Tokens of a reply.")
    hang_up: float = flag(0.33, "Share of the replies that are broken off by the client.")
    server_pid: int | None = flag(None, "Process of the server, whose memory is read (Linux).")
    output: str | None = flag(None, "JSON file for the figures.")

    def __post_init__(self) -> None:
        require_positive(self, "clients", "seconds", "prompts", "prompt_tokens", "reply_tokens")


@dataclass
class Figures:
    """What was seen. `gaps`: seconds between the pieces of a reply; `firsts`: until its first piece."""

    complete: int = 0
    hung_up: int = 0
    refused: int = 0
    wrong: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    firsts: list[float] = field(default_factory=list)
    tokens: int = 0


def main() -> None:
    (load_args,) = parse_args(sys.argv[1:], [LoadArguments], __doc__)
    figures = asyncio.run(measure(load_args))
    notice(json.dumps(figures, indent=2))
    if load_args.output:
        Path(load_args.output).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    if figures["wrong"] or figures["lost"]:
        raise SystemExit(1)


async def measure(load_args: LoadArguments) -> dict[str, Any]:
    import httpx

    limits, headers = httpx.Limits(max_connections=None), {"Authorization": f"Bearer {load_args.api_key}"}
    async with httpx.AsyncClient(
        base_url=load_args.url, headers=headers, timeout=httpx.Timeout(600), limits=limits
    ) as http:
        asker = Asker(http, load_args)
        try:
            prompts = await asker.start()
        except httpx.HTTPError as error:
            raise UserError(f"--url {load_args.url} does not answer: {error}") from error
        alone = Figures()
        expected = [await asker.ask(prompt, alone) for prompt in prompts]
        if alone.lost or alone.refused:
            raise UserError(f"--url {load_args.url}: the first replies failed: {alone.lost or 'HTTP 429'}")
        together, memory = Figures(), [read_memory(load_args.server_pid)]
        end = time.perf_counter() + load_args.seconds
        clients = [
            ask_until(end, asker, prompts, expected, together, random.Random(i))
            for i in range(load_args.clients)
        ]
        watch = asyncio.create_task(watch_memory(load_args.server_pid, memory))
        start = time.perf_counter()
        await asyncio.gather(*clients)
        seconds = time.perf_counter() - start
        watch.cancel()
        memory.append(read_memory(load_args.server_pid))
        return describe(alone, together, seconds, memory)


class Asker:
    def __init__(self, http: Any, load_args: LoadArguments):
        self.http, self.args, self.model = http, load_args, load_args.model

    async def start(self) -> list[str]:
        """Texts of about --prompt_tokens tokens each; finds the model's name where none is given."""
        lines = QUESTIONS.read_text(encoding="utf-8").splitlines()
        questions = [json.loads(line)["text"] for line in lines]
        text = " ".join(questions)[: 3 * self.args.prompt_tokens]
        if self.model is None:
            self.model = (await self.http.get("/models")).json()["data"][0]["id"]
        # Of this text and of one letter: what is not the letter's is the template's.
        long, short = [await self.count_tokens(one) for one in (text, "a")]
        characters = round(len(text) * (self.args.prompt_tokens - short) / (long - short))
        count = len(questions)
        turned = [" ".join(questions[i % count :] + questions[: i % count]) for i in range(self.args.prompts)]
        return [one[: max(characters, 1)] for one in turned]

    async def count_tokens(self, text: str) -> int:
        response = await self.http.post("/chat/completions", json=self.build_body(text, 1))
        if response.status_code != 200:
            raise UserError(f"--url {self.args.url} answers {response.status_code}: {response.text[:200]}")
        return int(response.json()["usage"]["prompt_tokens"])

    def build_body(self, prompt: str, tokens: int) -> dict[str, Any]:
        messages = [{"role": "user", "content": prompt}]
        exactly = {"max_tokens": tokens, "min_tokens": tokens}
        return {"model": self.model, "messages": messages, "temperature": 0} | exactly

    async def ask(self, prompt: str, figures: Figures, hang_up_after: int | None = None) -> str | None:
        """The reply's text, or what came of it until the client hung up; None where there is none."""
        import httpx

        body = self.build_body(prompt, self.args.reply_tokens) | {"stream": True}
        text, finished, start, last = "", None, time.perf_counter(), 0.0
        try:
            async with self.http.stream("POST", "/chat/completions", json=body) as response:
                if response.status_code != 200:
                    await response.aread()
                    figures.refused += response.status_code == 429
                    if response.status_code != 429:
                        figures.lost.append(f"HTTP {response.status_code}: {response.text[:200]}")
                    return None
                async for line in response.aiter_lines():
                    if not line.startswith("data: {"):
                        continue
                    choice = json.loads(line.removeprefix("data: "))["choices"][0]
                    if piece := choice["delta"].get("content"):
                        now = time.perf_counter()
                        figures.gaps += [now - last] if last else []
                        figures.firsts += [] if last else [now - start]
                        text, last = text + piece, now
                    finished = choice["finish_reason"] or finished
                    if hang_up_after is not None and len(text) >= hang_up_after:
                        figures.hung_up += 1
                        return text
        except (httpx.HTTPError, KeyError, ValueError) as error:
            figures.lost.append(f"{type(error).__name__}: {error}")
            return None
        if finished is None:
            figures.lost.append(f"a reply without an end: {text[-60:]!r}")
            return None
        figures.complete += 1
        figures.tokens += self.args.reply_tokens
        return text


async def ask_until(
    end: float,
    asker: Asker,
    prompts: list[str],
    expected: list[str | None],
    figures: Figures,
    rng: random.Random,
) -> None:
    """One client: asks, compares, and asks again."""
    while time.perf_counter() < end:
        i = rng.randrange(len(prompts))
        whole = expected[i] or ""
        hangs_up = rng.random() < asker.args.hang_up
        told = await asker.ask(prompts[i], figures, rng.randrange(len(whole) + 1) if hangs_up else None)
        if told is None:
            await asyncio.sleep(0.5 + rng.random())
        elif not (whole.startswith(told) if hangs_up else told == whole):
            figures.wrong.append(f"prompt {i}: {told[-80:]!r} for {whole[-80:]!r}")


async def watch_memory(pid: int | None, memory: list[float]) -> None:
    while True:
        await asyncio.sleep(2)
        memory.append(read_memory(pid))


def read_memory(pid: int | None) -> float:
    """MB that the process holds; 0 where none is named."""
    if pid is None:
        return 0.0
    lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    return round(next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1000, 1)


def describe(alone: Figures, together: Figures, seconds: float, memory: list[float]) -> dict[str, Any]:
    p95, p95_alone = find_p95(together.gaps), find_p95(alone.gaps)
    third = len(memory) // 3
    return {
        "complete": together.complete,
        "hung_up": together.hung_up,
        "refused_429": together.refused,
        "wrong": together.wrong,
        "lost": together.lost,
        "seconds": round(seconds, 1),
        "tokens_per_second": round(together.tokens / seconds, 1),  # of complete replies
        "first_piece_median_seconds": round(median(together.firsts or [0.0]), 3),
        "gap_p95_ms": round(1000 * p95, 1),
        "gap_p95_ms_alone": round(1000 * p95_alone, 1),
        "gap_p95_ratio": round(p95 / p95_alone, 2) if p95_alone else None,
        "memory_mb": {"start": memory[0], "first_third": max(memory[: third + 1]), "end": memory[-1]},
    }


def find_p95(gaps: list[float]) -> float:
    return quantiles(gaps, n=20)[-1] if len(gaps) > 1 else 0.0


if __name__ == "__main__":
    run_main(main)
