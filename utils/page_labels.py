"""Words and looks of the page; labels follow the browser's language."""

ENGLISH = {
    "tuned": "tuned",
    "base": "base",
    "system": "System message",
    "max_new_tokens": "Longest reply, tokens",
    "temperature": "Temperature (0: the likeliest token)",
    "top_p": "Top p",
    "top_k": "Top k",
    "beams": "Beams",
    "stream": "Show words as they come",
    "ask": "Write a message. Enter sends, Shift+Enter breaks the line",
    "clear": "New conversation",
    "settings": "Settings",
}
CHINESE = {
    "tuned": "微调后",
    "base": "原模型",
    "system": "系统提示",
    "max_new_tokens": "回复最多 token 数",
    "temperature": "温度（0：最可能的 token）",
    "top_p": "Top p",
    "top_k": "Top k",
    "beams": "束搜索宽度",
    "stream": "逐字显示",
    "ask": "输入消息。回车发送，Shift+回车换行",
    "clear": "新对话",
    "settings": "设置",
}
LABELS = {"en": ENGLISH, "zh": CHINESE, "zh-CN": CHINESE, "zh-TW": CHINESE}

TOO_LONG = (
    "This message is too long: {size}; at most {limit} tokens are read here. "
    "消息过长：最多读取 {limit} 个 token。"
)
ENDINGS = {
    "length": "cut at the longest reply 已达长度上限",
    "time": "cut after {limit_seconds:g} s 已达时间上限",
    "interrupted": "stopped 已停止",
    "stop": "",
}

CSS = """
.gradio-container { max-width: 900px !important; width: 100% !important; margin: 0 auto !important; }
#head { align-items: center; flex-wrap: nowrap; }
#title h2 { margin: 0; font-size: 1.15em; }
#side { width: auto; min-width: max-content !important; flex-grow: 0; }
#chat .message { overflow-wrap: anywhere; }
#chat .top-panel { display: none; }
#box textarea { padding: 12px 4px 12px 12px; }
#box .submit-button, #box .stop-button { margin: 7px 7px 7px 0; }
#foot { align-items: center; flex-wrap: nowrap; }
#status { font-size: 0.85em; opacity: 0.75; overflow-wrap: anywhere; }
footer { display: none !important; }
@media (max-width: 600px) {
  #title { display: none; }
  #status { font-size: 0.75em; }
  #clear { min-width: 90px !important; }
}
"""
