"""Words of the page, in the browser's language: English and Chinese."""

from typing import Any

ENGLISH = {
    "tuned": "tuned",
    "base": "base",
    "both": "both",
    "system": "System message",
    "max_new_tokens": "Longest reply, tokens",
    "temperature": "Temperature (0: the likeliest token)",
    "top_p": "Top p",
    "top_k": "Top k",
    "beams": "Beams",
    "thinking": "Think before each reply",
    "stream": "Show words as they come",
    "ask": "Write a message (Shift+Enter: new line)",
    "clear": "New conversation",
    "export": "Save",
    "settings": "Settings",
}
CHINESE = {
    "tuned": "微调后",
    "base": "原模型",
    "both": "对比",
    "system": "系统提示",
    "max_new_tokens": "回复最多 token 数",
    "temperature": "温度（0：最可能的 token）",
    "top_p": "Top p",
    "top_k": "Top k",
    "beams": "束搜索宽度",
    "thinking": "先思考，再回答",
    "stream": "逐字显示",
    "ask": "输入消息（Shift+回车换行）",
    "clear": "新对话",
    "export": "保存",
    "settings": "设置",
    "chatbot.copy_message": "复制消息",  # gradio's own words, which its Chinese lacks
    "chatbot.copied_message": "已复制",
}
LABELS = {"en": ENGLISH, "zh": CHINESE, "zh-CN": CHINESE, "zh-TW": CHINESE}

ENGLISH_LINES = {
    "speed": "{tokens} tokens, {speed:.1f} tokens/s",
    "stop": "",
    "length": "cut at the longest reply",
    "time": "cut after {seconds:g} s",
    "interrupted": "stopped",
    "thought": "Thought",
    "dropped": "the oldest {count} messages no longer fit and are not read",
    "no text": "This message has no text: write something.",
    "half a character": "This message holds half a character (a lone surrogate): send whole ones.",
    "no number": "A setting is empty or no number: fill it in under Settings.",
    "no conversation": "The conversation that was sent cannot be read: start a new one.",
    "characters": "{size:,} characters",
    "tokens": "{size:,} tokens",
    "too long": "This message is too long: {size}; at most {limit} tokens are read here.",
}
CHINESE_LINES = {
    "speed": "{tokens} 个 token，每秒 {speed:.1f} 个",
    "stop": "",
    "length": "已达长度上限",
    "time": "已达时间上限 {seconds:g} 秒",
    "interrupted": "已停止",
    "thought": "思考过程",
    "dropped": "最早的 {count} 条消息已放不下，不再读取",
    "no text": "这条消息没有文字：请输入内容。",
    "half a character": "这条消息里有半个字符（单独的代理项）：请发送完整的字符。",
    "no number": "有一项设置为空或不是数字：请在“设置”里填好。",
    "no conversation": "发来的对话无法读取：请开始新对话。",
    "characters": "{size:,} 个字符",
    "tokens": "{size:,} 个 token",
    "too long": "消息过长：{size}；这里最多读取 {limit} 个 token。",
}


def choose_words(headers: Any) -> dict[str, str]:
    """Labels and status lines in the language that the browser asks for first."""
    chinese = headers.get("accept-language", "").lower().startswith("zh")
    return CHINESE | CHINESE_LINES if chinese else ENGLISH | ENGLISH_LINES
