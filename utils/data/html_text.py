"""Markdown of a reply that was copied as HTML, as ShareGPT's pages were.

ShareGPT's button kept a reply as the outerHTML of ChatGPT's page and a question as its bare text. So replies
alone come here, and only what such a page can hold is converted: elements that Markdown makes, no text beside
them. An answer that mentions tags, or is HTML of another kind (a form, a whole document), stays as it is.
"""

import re
from typing import Any

from bs4 import BeautifulSoup, NavigableString, Tag
from bs4.exceptions import ParserRejectedMarkup
from markdownify import MarkdownConverter

BLOCKS = set("blockquote div h1 h2 h3 h4 h5 h6 hr ol p pre table ul".split())
INLINE = set("a b br code del em i img kbd s span strong sub sup".split())
PAGE_TAGS = BLOCKS | INLINE | set("li tbody td tfoot th thead tr".split())
CONVERTED = "HTML turned into Markdown"
LABELS_TAKEN_OUT = "labels and buttons of HTML code blocks taken out"
FORMULAS_KEPT = "formulas in HTML kept as TeX, their drawing taken out"


class PageConverter(MarkdownConverter):
    """markdownify with code blocks as they were written, fenced, with their language, every blank kept, and
    an empty line between the items of a list whose items are paragraphs."""

    def convert_li(self, el: Tag, text: str, parent_tags: set[str]) -> str:
        item = super().convert_li(el, text, parent_tags)  # type: ignore[misc]  # not in the package's .pyi
        return item if el.find("p", recursive=False) is None else f"{item}\n"

    def convert_pre(self, el: Tag, text: str, parent_tags: set[str]) -> str:
        code, body = el.find("code") or el, el.get_text()
        if not body.strip():
            return ""
        named = re.search(r"language-(\S+)", " ".join(code.get_attribute_list("class")))
        language, end = named[1] if named else "", "" if body.endswith("\n") else "\n"
        fence = "`" * max(3, *(len(run) + 1 for run in re.findall("`+", body)), 0)
        return f"\n\n{fence}{language}\n{body}{end}{fence}\n\n"


CONVERTER = PageConverter(
    heading_style="atx", bullets="-", escape_asterisks=False, escape_underscores=False,
    sub_symbol="<sub>", sup_symbol="<sup>",
)  # fmt: skip


def convert_page(text: str) -> tuple[str, list[str]]:
    """(Markdown, what was done) where all of `text` is a piece of a page; else (`text`, [])."""
    is_marked_up = re.match(r"\s*<\w", text) and re.search(r"</\w+>$", text.rstrip())
    if not is_marked_up or "<![" in text:  # some parsers lose what follows that
        return text, []
    try:
        page = BeautifulSoup(text, "html.parser")
        notes = [CONVERTED, *take_out_labels(page), *unwrap_formulas(page)]
        return (CONVERTER.convert_soup(page).strip(), notes) if is_page(page) else (text, [])
    except (ParserRejectedMarkup, RecursionError):  # no page is so broken or so deep
        return text, []


def is_page(page: Any) -> bool:
    """Whether the top holds blocks alone, and no element is one that Markdown does not make."""
    top_is_blocks = all(
        child.name in BLOCKS if isinstance(child, Tag) else not child.strip() for child in page.children
    )
    return top_is_blocks and all(tag.name in PAGE_TAGS for tag in page.find_all(True))


def take_out_labels(page: Any) -> list[str]:
    """Leave of each code block the code: above it stand its language and a button, `pythonCopy code`."""
    notes = []
    for block in page.find_all("pre"):
        codes = block.find_all("code")
        if len(codes) == 1 and block.get_text() != codes[0].get_text():
            block.clear()
            block.append(codes[0])
            notes = [LABELS_TAKEN_OUT]
    return notes


def unwrap_formulas(page: Any) -> list[str]:
    """Put the TeX that KaTeX keeps in place of its two drawings of it."""
    notes = []
    for formula in page.find_all(class_="katex"):
        source = formula.find("annotation")
        if source is not None:
            mark = "$$" if "katex-display" in formula.parent.get("class", []) else "$"
            formula.replace_with(NavigableString(f"{mark}{source.get_text().strip()}{mark}"))
            notes = [FORMULAS_KEPT]
    return notes
