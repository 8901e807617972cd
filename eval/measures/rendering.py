"""The report as a page and a picture, from what eval.report measured."""

from pathlib import Path
from typing import Any

SHOWN_ANSWERS = 10
SHOWN_CHARACTERS = 700  # of an answer on the page; report.json has all of it
COST_ROWS = (
    ("steps", "optimizer steps", "{:,}"),
    ("train_tokens", "tokens trained on", "{:,.0f}"),
    ("train_seconds", "seconds", "{:,.0f}"),
    ("tokens_per_second", "tokens a second", "{:,.0f}"),
    ("peak_memory_gib", "peak memory, GiB", "{:.2f}"),
    ("train_loss", "mean training loss", "{:.3f}"),
    ("eval_loss", "held-out loss as the run logged it", "{:.4f}"),
)


def render_report(content: dict[str, Any], folder: Path) -> str:
    """The page as markdown; `folder` is where it will lie, beside the pictures."""
    base = (content["record"]["base_model"] or {}).get("name", "its base")
    sections = [
        f"# {Path(content['run']).name}: before and after\n\nBase `{base}` against the same base with the "
        f"adapter of `{content['run']}`, in one process, by the same prompts.",
        render_verdict(content["results"]),
        render_table(content["results"]),
        content["left_out"],
        "![before and after](report.png)",
        render_cost(content),
        *(["![training curve](training_curve.png)"] if (folder / "training_curve.png").is_file() else []),
        render_answers(content),
        render_limits(content),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def render_verdict(results: list[dict[str, Any]]) -> str:
    """What got worse first, plainly."""

    def list_names(verdict: str) -> str:
        return "; ".join(
            f"{row['name']} ({format_value(row, 'before')} to {format_value(row, 'after')})"
            for row in results
            if row["verdict"] == verdict
        )

    worse, better = list_names("worse"), list_names("better")
    lines = ["## Verdict\n"]
    lines.append(f"**Worse: {worse}.**" if worse else "Nothing measured here got clearly worse.")
    lines.append(f"Better: {better}." if better else "Nothing measured here got clearly better.")
    unclear = ", ".join(row["name"] for row in results if row["verdict"] == "unclear")
    if unclear:
        lines.append(f"No clear difference on this many items: {unclear}.")
    return "\n\n".join(lines)


def format_value(row: dict[str, Any], name: str, sign: str = "") -> str:
    return f"{100 * row[name]:{sign}.1f}%" if row["percent"] else f"{row[name]:{sign}.3f}"


def render_table(results: list[dict[str, Any]]) -> str:
    lines = [
        "| measure | items | before | after | change, 95% interval | |",
        "|---|---:|---:|---:|---:|---|",
    ]
    for row in results:
        before, after, low, high = (format_value(row, name) for name in ("before", "after", "low", "high"))
        change = f"{format_value(row, 'change', '+')} ({low} to {high})"
        lines.append(f"| {row['name']} | {row['items']} | {before} | {after} | {change} | {row['verdict']} |")
    return "\n".join(lines)


def render_cost(content: dict[str, Any]) -> str:
    cost = content["cost"]
    rows = [f"| {label} | {form.format(cost[name])} |" for name, label, form in COST_ROWS if name in cost]
    command = content["record"]["command"]
    made = f"\n\n```bash\n{command}\n```" if command else ""
    return "## What it cost\n\n| | |\n|---|---:|\n" + "\n".join(rows) + made if rows else ""


def render_answers(content: dict[str, Any]) -> str:
    """Held-out rows and questions from end to end of the files, never chosen by their answers."""
    half = content["held_out_answers"][: SHOWN_ANSWERS // 2]
    rest = content["answers"]
    count = min(SHOWN_ANSWERS - len(half), len(rest))
    rows = half + [rest[i * len(rest) // count] for i in range(count)]
    lines = ["## Ten answers\n", "| question | before | after |", "|---|---|---|"]
    for row in rows:
        question = f"{escape_cell(row['question'])}<br>*{row['category']}*"
        lines.append(f"| {question} | {escape_cell(row['before'])} | {escape_cell(row['after'])} |")
    return "\n".join(lines)


def escape_cell(text: str) -> str:
    """Text for a markdown table: on one line, cut, nothing in it read as markup."""
    text = text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + " [...]"
    for character, escaped in (
        ("&", "&amp;"),
        ("<", "&lt;"),
        ("|", "\\|"),
        ("`", "\\`"),
        ("*", "\\*"),
        ("_", "\\_"),
    ):
        text = text.replace(character, escaped)
    return text.strip().replace("\n", "<br>") or "(empty)"


def render_limits(content: dict[str, Any]) -> str:
    settings = content["settings"]
    return (
        "## How to read it\n\n"
        "Better and worse mean that the 95% interval of the paired difference leaves out 0; with "
        f"{len(content['results'])} measures one may do so by chance. Intervals are over the items, for this "
        'one training seed. "Came to an end" counts answers that stopped by themselves within '
        f"{settings['max_new_tokens']} tokens; the rest were cut off. Language is what most of an answer's "
        "text is written in. Answers of one phrase say the clause that most answers say; three such answers "
        "and a tenth of all more than before are worse, whatever the interval. The quizzes are easy: they "
        "show a broken model, not which of two good ones is "
        "better. eval/README.md says how each number is made."
    )


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
