"""A reply copied as HTML reads as the Markdown it was shown from; whatever is no such page stays as it is."""

import html
import re

import pytest
from helpers.rows import load, write_rows
from markdown_it import MarkdownIt

from utils.data.formats import read_row
from utils.data.html_text import CONVERTED, FORMULAS_KEPT, LABELS_TAKEN_OUT, convert_page

REPLIES = {
    "numbered list": "Do this:\n\n3. first\n4. **second**\n   - inner *one*\n   - inner two\n5. third",
    "list of paragraphs": "1. one\n\n   more\n\n2. two\n\n   - a\n   - b\n\n3. three\n\nEnd.\n\n- x\n\n- y",
    "headings and links": "# Top\n\n### Below\n\nSee [the *site*](https://a.b/c_d?e=1&f=2 \"T\") and <https://x.y>.",
    "signs of Markdown in text": "5 \\* 3, snake_case_name, 2**8, a < b > c, `a*b_c`, #1, & \\[x]",
    "table and quote": "| a | b |\n| --- | --- |\n| 1 | `2` |\n\n> quoted\n>\n> twice\n\n---\n\nend",
    "blanks of code": "Run:\n\n```python\n\n\ndef f(x):\n\n\n\n    return '''  <p>\n\t'''  \n\n```\n\n- in a list:\n\n  ```c++\n  a  =  1;\n\n\n    b;\n  ```",
    "code that holds fences": "````\n```\nx\n```\n````\n\nand `` a`b ``.",
    "lines": "one\ntwo  \nthree ~~four~~ 五 🎉",
}  # fmt: skip


def build_page(rendered):
    """ChatGPT's page around what Markdown was rendered to: a label and a button above each code block."""
    label = '<div class="bg-black"><div><span>{}</span><button><svg><path d="M0"></path></svg>Copy code</button></div>'

    def add_label(match):
        name = re.sub(".*language-", "", match[1] or "")
        shown, code = label.format(name), f'<code class="!whitespace-pre hljs language-{name}">'
        return (
            f"<pre>{shown}<div>{code if name else '<code>'}<span>{match[2]}</span></code></div></div></pre>"
        )

    page = re.sub(r'<pre><code(?: class="([^"]*)")?>(.*?)</code></pre>', add_label, rendered, flags=re.DOTALL)
    return f'<div class="markdown prose w-full break-words dark:prose-invert light">{page}</div>'


@pytest.mark.parametrize("name", REPLIES)
def test_page_becomes_markdown_that_shows_the_same_page(name):
    """Held against another program, markdown-it: page -> Markdown -> the page again."""
    show = MarkdownIt().enable(["table", "strikethrough"]).render
    rendered = show(REPLIES[name])
    markdown, notes = convert_page(build_page(rendered))
    assert "Copy code" not in markdown and show(markdown).strip() == rendered.strip()
    assert notes == [CONVERTED] + [LABELS_TAKEN_OUT] * ("<pre>" in rendered)


def test_lists_links_and_headings_are_kept():
    page = '<h2>Steps</h2>\n<ol><li>one</li><li>See <a href="https://a.b/c_d">it</a></li></ol>'
    assert convert_page(page)[0] == "## Steps\n\n1. one\n2. See [it](https://a.b/c_d)"


def test_text_of_a_page_is_not_escaped():
    page = "<p>a_b_c, 2 * 3 * 4, &lt;div&gt;, [x], 1. # | &amp; ~</p>"
    assert convert_page(page)[0] == "a_b_c, 2 * 3 * 4, <div>, [x], 1. # | & ~"


def test_formula_is_its_tex_once():
    drawn = (
        '<span class="katex"><span class="katex-mathml"><math><semantics><msup><mi>x</mi><mn>2</mn></msup>'
        '<annotation encoding="application/x-tex">x^2_{a}</annotation></semantics></math></span>'
        '<span class="katex-html" aria-hidden="true"><span style="height:1em">x2</span></span></span>'
    )
    page = f'<p>So {drawn}:</p><p><span class="katex-display">{drawn}</span></p><p>H<sub>2</sub>O</p>'
    assert convert_page(page) == (
        "So $x^2_{a}$:\n\n$$x^2_{a}$$\n\nH<sub>2</sub>O", [CONVERTED, FORMULAS_KEPT]
    )  # fmt: skip


KEPT = {
    "tag in a sentence": "Use the <div> tag.",
    "tag in a fence": "```html\n<p>Hi</p>\n```",
    "tag in a fence behind a sentence": "So:\n\n```html\n<div>\n  <p>Hi</p>\n</div>\n```\n",
    "unclosed": "<p>unclosed",
    "comparison": "a < b > c",
    "inline alone": "<b>x</b>",
    "text beside elements": "<p>Hi</p> is a paragraph, bold is <b>x</b>",
    "text between elements": "<p>Hi</p>\nand\n<p>Ho</p>",
    "placeholder": "<p>Dear <name>, your vector<int> is here</p>",
    "a form": "<div><form><input name='q'><button>Go</button></form></div>",
    "a document": "<!DOCTYPE html>\n<html><body><p>Hi</p></body></html>",
    "a comment first": "<!-- c --><p>x</p>",
    "broken": "<p><![x</p>",
    "deep": "<div>" * 3000 + "x" + "</div>" * 3000,
    "Markdown": "1. *a*\n2. [b](c_d)  \n\n\n\n   x &amp; y\u00a0\r\n",
}


@pytest.mark.parametrize("case", KEPT)
def test_reply_that_is_no_page_is_kept_byte_for_byte(case):
    assert convert_page(KEPT[case]) == (KEPT[case], [])
    row = {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": KEPT[case]}]}
    chat = read_row(row, "sharegpt")
    assert chat.messages[1]["content"] == KEPT[case] and chat.cleaned == ()


def test_report_counts_what_was_done_to_the_rows(tmp_path):
    page = build_page("<p>Run:</p><pre><code>x</code></pre>")
    rows = [
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": value}]}
        for value in ("plain", page, "<p>a</p>", page)
    ]
    (scan,) = load(write_rows(tmp_path / "rows.json", rows)).scans
    assert scan.cleaned == {CONVERTED: [3, [2, 3, 4]], LABELS_TAKEN_OUT: [2, [2, 4]]}


def test_page_that_a_human_asks_about_is_kept():
    """ShareGPT kept questions as bare text: HTML in one is what was asked about."""
    page = "<div><p>What does this show?</p></div>"
    turns = [{"from": "human", "value": page}, {"from": "gpt", "value": f"<p>{html.escape(page)}</p>"}]
    chat = read_row({"conversations": turns}, "sharegpt")
    assert [message["content"] for message in chat.messages] == [page, page]
    assert chat.cleaned == (CONVERTED,)
