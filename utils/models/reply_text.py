"""What a model writes -> text whose thought stands in <think> tags, whatever marks this model uses.

    Qwen3             <think>\\nSo ...\\n</think>\\n\\nFour.                            is it already
    Qwen3.5, R1       So ...\\n</think>\\n\\nFour.                the prompt has opened the thought
    gpt-oss           <|channel|>analysis<|message|>So ...<|end|> ... <|channel|>final<|message|>Four.

Terminal, page, samples and evaluation read this one text, and send it back as the history of the chat. It
comes in pieces, as it is generated: what may be the beginning of a mark waits until the next piece tells.
"""

from collections.abc import Iterable, Iterator

from utils.prompts.rendering import CLOSE, OPEN, ThoughtStyle


def tag_thought(pieces: Iterable[str], style: ThoughtStyle, is_opened: bool) -> Iterator[str]:
    """The pieces of a reply with <think> and </think> around its thought, each tag in one piece.

    `is_opened`: the prompt has opened the thought.
    """
    begun = ""
    pieces = (piece for piece in pieces)  # asked again at its end it ends again; a queue would wait
    opening, closing, lead = style.opening.strip() or OPEN, style.closing.strip(), style.lead.strip()
    if is_opened:
        yield f"{OPEN}\n"
    else:
        begun = read_start(pieces, [opening, lead])
        if not begun.startswith(opening):
            yield begun.removeprefix(lead)
            yield from pieces
            return
        yield OPEN if opening == OPEN else f"{OPEN}\n"
        begun = begun.removeprefix(opening)
    yield from tag_end(begun, pieces, closing)


def read_start(pieces: Iterator[str], marks: list[str]) -> str:
    """The reply's beginning, without the blanks before it, until it is one of the marks or can be none."""
    begun = ""
    for piece in pieces:
        begun = (begun + piece).lstrip()
        if not any(begun != mark and mark.startswith(begun) for mark in marks):
            break
    return begun


def tag_end(begun: str, pieces: Iterator[str], closing: str) -> Iterator[str]:
    """What follows the opened thought, with </think> in place of `closing`."""
    waiting = begun
    for piece in pieces if closing not in begun else ():
        waiting += piece
        if closing in waiting:
            break
        held = next(n for n in range(len(closing), -1, -1) if waiting.endswith(closing[:n]))
        yield waiting[: len(waiting) - held]
        waiting = waiting[len(waiting) - held :]
    thought, ended, answer = waiting.partition(closing)
    yield thought
    if ended:
        yield CLOSE if closing == CLOSE else f"\n{CLOSE}\n\n"
    yield answer
    yield from pieces
