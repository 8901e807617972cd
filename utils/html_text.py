"""Markdown of a reply that was copied as HTML, as ShareGPT's pages were."""

import re
from html.parser import HTMLParser

BLOCKS = {"p", "div", "ul", "ol", "table", "tr", "h1", "h2", "h3", "h4", "blockquote"}
OPENING = {"li": "\n- ", "br": "\n", "strong": "**", "em": "*", "td": " ", "th": " "}
CLOSING = {"strong": "**", "em": "*"}


def strip_html(text: str) -> str:
    """`text` as Markdown where all of it is a piece of a page; an answer that only mentions tags is kept."""
    if not re.match(r"\s*<(div|p|ol|ul|pre|h[1-4])\b[^>]*>", text) or not re.search(r"</\w+>\s*$", text):
        return text
    page = PageText()
    page.feed(text)
    page.close()
    return re.sub(r"\n{3,}", "\n\n", "".join(page.parts)).strip()


class PageText(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.block_start: int | None = None  # where the open code block begins in `parts`

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag == "pre":
            self.parts.append("\n\n```")
            self.block_start = len(self.parts)
        elif tag == "code" and self.block_start is not None:
            language = re.search(r"language-(\w+)", dict(attributes).get("class") or "")
            # What stands before the code in its block is a label and a button.
            self.parts[self.block_start :] = [f"{language.group(1) if language else ''}\n"]
        elif tag == "code":
            self.parts.append("`")
        elif self.block_start is None:
            self.parts.append(OPENING.get(tag, "\n\n" if tag in BLOCKS else ""))

    def handle_endtag(self, tag: str) -> None:
        if tag == "pre":
            self.parts.append("```\n\n" if self.parts[-1].endswith("\n") else "\n```\n\n")
            self.block_start = None
        elif self.block_start is None:
            self.parts.append("`" if tag == "code" else CLOSING.get(tag, "\n\n" if tag in BLOCKS else ""))

    def handle_data(self, data: str) -> None:
        self.parts.append(data)
