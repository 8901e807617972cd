"""Chat templates that deal with thoughts, and what a reply to each looks like, written down by hand.

The small ones each behave as one kind of published template does. The published ones themselves are no part of
this repository: they are read where shared/data/templates is found beside it.
"""

from dataclasses import dataclass

from helpers import ROOT

PUBLISHED = next(
    (path for path in (ROOT / "shared", ROOT.parent / "shared") if (path / "data" / "templates").is_dir()),
    None,
)


@dataclass(frozen=True)
class Kind:
    """A template; what a reply with a thought {t} and one without is, up to its stop token."""

    name: str
    thinks: str
    answers: str
    source: str = ""
    tokens: tuple[str, ...] = ("<think>", "</think>")  # that the model's tokenizer has
    eos: str = "<|im_end|>"
    key: str = "reasoning_content"  # of a thought in a server's messages; "" where it takes text
    switch: bool = True
    default: str = "on"
    keeps: bool = False  # thoughts of earlier turns

    def read(self) -> str:
        assert PUBLISHED or self.source
        return self.source or (PUBLISHED / "data" / "templates" / f"{self.name}.jinja").read_text(
            encoding="utf-8"
        )

    def write(self, thought: str | None, answer: str) -> str:
        """The reply's text."""
        return self.answers.format(a=answer) if thought is None else self.thinks.format(t=thought, a=answer)

    def message(self, thought: str | None, answer: str) -> dict[str, str]:
        """The message as a client of the server has it."""
        if thought is None:
            return {"role": "assistant", "content": answer}
        if not self.key:
            return {"role": "assistant", "content": f"<think>\n{thought}\n</think>\n\n{answer}"}
        return {"role": "assistant", "content": answer, self.key: thought}


START = "<|im_start|>{{ m.role }}\n"
QUESTION = "{% if m.role != 'assistant' %}" + START + "{{ m.content }}<|im_end|>\n{% else %}"
LAST = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
)
PROMPT = "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
EMPTY = "<think>\n\n</think>\n\n"
# The thought of the last answer alone is kept, an empty one stands in its place; a switch, on by default.
DROPS = (
    LAST + "{% for m in messages %}" + QUESTION + START
    + "{% if loop.index0 > ns.last %}<think>\n{{ m.reasoning_content or '' }}\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n" + PROMPT
    + "{% if enable_thinking is defined and not enable_thinking %}" + EMPTY + "{% endif %}{% endif %}"
)  # fmt: skip
# The same, and the prompt opens the thought; a switch that is off by default.
OPENS = DROPS.replace(
    "{% if enable_thinking is defined and not enable_thinking %}" + EMPTY,
    "{% if enable_thinking is defined and enable_thinking %}<think>\n{% else %}" + EMPTY,
)
# No thought is shown anywhere, the prompt opens one, and there is no switch.
HIDES = (
    "{{ bos_token }}{% for m in messages %}" + QUESTION
    + START + "{{ m.content.split('</think>')[-1] }}<|im_end|>\n" + PROMPT + "<think>\n{% endif %}"
)  # fmt: skip
# Thoughts stay where they are, in every turn.
KEEPS = (
    "{% for m in messages %}" + QUESTION + START
    + "{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n" + PROMPT + "{% endif %}"
)  # fmt: skip
# Thoughts and answers are messages of their own channels; the answer that ends a reply has another mark.
CHANNELS = (
    "{% for m in messages %}{% if m.role != 'assistant' %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>"
    "{% elif loop.last and not add_generation_prompt %}{% if 'thinking' in m %}"
    "<|start|>assistant<|channel|>analysis<|message|>{{ m.thinking }}<|end|>{% endif %}"
    "<|start|>assistant<|channel|>final<|message|>{{ m.content }}<|return|>"
    "{% else %}<|start|>assistant<|channel|>final<|message|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
CHANNEL_TOKENS = ("<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|return|>")
ANALYSIS = "<|channel|>analysis<|message|>{t}<|end|><|start|>assistant"
FINAL = "<|channel|>final<|message|>{a}<|return|>"
# The switch is said behind each question too, nothing closes an answer, and an empty thought is always there.
SLASH = (
    LAST + "{% for m in messages %}{% if m.role == 'user' %}<|user|>\n{{ m.content }}"
    "{{ '/nothink' if enable_thinking is defined and not enable_thinking else '' }}{% else %}<|assistant|>"
    "{% if loop.index0 > ns.last and m.reasoning_content %}{{ '\n<think>' + m.reasoning_content + '</think>' }}"
    "{% else %}{{ '\n<think></think>' }}{% endif %}{{ '\n' + m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>"
    "{{ '\n<think></think>' if enable_thinking is defined and not enable_thinking else '' }}{% endif %}"
)
# Thoughts are the text's own, as in SmolLM3; the switch puts an empty one into the prompt.
TEXT = (
    "{% for m in messages %}" + QUESTION + START + "{{ m.content }}<|im_end|>\n" + PROMPT
    + "{% if enable_thinking is defined and not enable_thinking %}" + EMPTY + "{% endif %}{% endif %}"
)  # fmt: skip

THINKS = "<think>\n{t}\n</think>\n\n{a}<|im_end|>"
OPENED = "{t}\n</think>\n\n{a}<|im_end|>"
PLAIN = "{a}<|im_end|>"
SMALL = [
    Kind("drops", THINKS, PLAIN, DROPS),
    Kind("opens", OPENED, PLAIN, OPENS, default="off"),
    Kind("hides", OPENED, "\n</think>\n\n" + PLAIN, HIDES, switch=False),
    Kind("keeps", THINKS, PLAIN, KEEPS, switch=False, keeps=True),
    Kind("channels", ANALYSIS + FINAL, FINAL, CHANNELS, CHANNEL_TOKENS, "<|return|>", "thinking", switch=False),
    Kind(
        "slash", "\n<think>{t}</think>\n{a}<|user|>", "\n{a}<|user|>", SLASH,
        ("<think>", "</think>", "<|user|>", "<|assistant|>"), "<|endoftext|>",
    ),
    Kind("text", THINKS, PLAIN, TEXT, key="", keeps=True),
]  # fmt: skip
TURN_TOKENS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
END = "<｜end▁of▁sentence｜>"
OTHERS = [  # published templates
    Kind("qwen3", THINKS, PLAIN),
    Kind("qwen3_5_think", OPENED, PLAIN),
    Kind("qwen3_5_nothink", OPENED, PLAIN, default="off"),
    Kind("nemotron_3_nano", "{t}\n</think>\n{a}<|im_end|>", PLAIN),
    Kind(
        "glm4moe", "\n<think>{t}</think>\n{a}<|user|>", "\n{a}<|user|>",
        tokens=("<think>", "</think>", "[gMASK]", "<sop>", "<|user|>", "<|assistant|>", "<|system|>"),
        eos="<|endoftext|>",
    ),
    Kind(
        "gptoss", ANALYSIS + FINAL, FINAL, tokens=CHANNEL_TOKENS, eos="<|return|>", key="thinking", switch=False
    ),
    Kind(
        "deepseekv3", OPENED.replace("<|im_end|>", END), "\n</think>\n\n{a}" + END,
        tokens=("<think>", "</think>", "<｜User｜>", "<｜Assistant｜>", END), eos=END, switch=False,
    ),
    *(
        Kind(
            name, "<think>\n{t}\n</think>\n\n{a}" + end, "{a}" + end, tokens=(*tokens, end), eos=end, key="",
            switch=False, keeps=True,
        )
        for name, tokens, end in (
            ("llama3", TURN_TOKENS, "<|eot_id|>"),
            ("phi3", ("<|user|>", "<|assistant|>"), "<|end|>"),
            ("gemma3", ("<start_of_turn>",), "<end_of_turn>"),
            ("qwen3_instruct_2507", (), "<|im_end|>"),
        )
    ),
]  # fmt: skip
KINDS = SMALL + [kind for kind in OTHERS if PUBLISHED]
