"""The report as a page and a picture, from what eval.report measured."""

import re
from pathlib import Path
from typing import Any

import jinja2

TEMPLATE = Path(__file__).with_name("report.md.jinja")
SHOWN_ANSWERS = 10
SHOWN_CHARACTERS = 700  # of an answer on the page; report.json has all of it


def render_report(content: dict[str, Any], folder: Path) -> str:
    """The page as markdown (report.md.jinja); `folder` is where it will lie, beside the pictures."""
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    environment.filters["cell"] = escape_cell
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        content,
        title=Path(content["run"]).name,
        base=(content["record"]["base_model"] or {}).get("name", "its base"),
        has_curve=(folder / "training_curve.png").is_file(),
        shown_answers=choose_answers(content),
        show=format_value,
    )


def format_value(row: dict[str, Any], name: str, sign: str = "") -> str:
    return f"{100 * row[name]:{sign}.1f}%" if row["percent"] else f"{row[name]:{sign}.3f}"


def choose_answers(content: dict[str, Any]) -> list[dict[str, Any]]:
    """Held-out rows and questions from end to end of the files, never chosen by their answers."""
    half = content["held_out_answers"][: SHOWN_ANSWERS // 2]
    rest = content["answers"]
    count = min(SHOWN_ANSWERS - len(half), len(rest))
    return half + [rest[i * len(rest) // count] for i in range(count)]


def escape_cell(text: str) -> str:
    """Text for a markdown table: on one line, cut, nothing in it read as markup."""
    text = text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + " [...]"
    text = re.sub(r"[|`*_]", r"\\\g<0>", text.replace("&", "&amp;").replace("<", "&lt;"))
    return text.strip().replace("\n", "<br>") or "(empty)"


def draw_measures(results: list[dict[str, Any]], path: Path) -> None:
    """A line a measure: before and after as bars, and beside them the change with its interval around 0."""
    from matplotlib.figure import Figure

    shown = [row for row in results if row["before"] or row["after"]]
    figure = Figure(figsize=(9, 0.6 + 0.75 * len(shown)), dpi=110)
    axes = figure.subplots(max(len(shown), 1), 2, width_ratios=(2, 1), squeeze=False)
    colours = {"better": "tab:green", "worse": "tab:red"}
    for (bars, change), row in zip(axes, shown, strict=False):
        scale, unit = (100, "%") if row["percent"] else (1, "")
        colour = colours.get(row["verdict"], "tab:blue")
        values = [scale * row["after"], scale * row["before"]]
        bars.barh(["after", "before"], values, color=[colour, "silver"], height=0.7)
        for place, value in enumerate(values):
            bars.text(value, place, f" {value:.4g}{unit}", va="center", fontsize=8)
        bars.set_xlim(0, 1.2 * (scale if row["percent"] else max(values)))
        bars.set_xticks([])
        bars.set_title(row["name"], fontsize=9, loc="left")
        middle = scale * row["change"]
        around = [[max(middle - scale * row["low"], 0)], [max(scale * row["high"] - middle, 0)]]
        change.errorbar([middle], [0], xerr=around, fmt="o", color=colour, markersize=4, capsize=3)
        change.axvline(0, color="grey", linewidth=0.8, linestyle="--")
        change.set_yticks([])
        reach = 1.3 * max(abs(scale * row[name]) for name in ("low", "high", "change")) or 1
        change.set_xlim(-reach, reach)
        for axis in (bars, change):
            axis.tick_params(labelsize=8)
            axis.spines[["top", "right"]].set_visible(False)
        change.spines["left"].set_visible(False)
    axes[0][1].set_title("change, 95% interval", fontsize=9)
    figure.tight_layout(h_pad=0.3)
    figure.savefig(path)
