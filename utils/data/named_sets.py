"""The data sets that --dataset_name knows by name. A new one is a line here; data/README.md shows how."""

from dataclasses import dataclass


@dataclass(frozen=True)
class NamedSet:
    """Where a set lives on the hub, and the format of its rows (utils/data/formats.py).

    `files`: its data files, where the hub's own loader would be a script or picks others; `revision`: the
    hub's parquet conversion of a set that was a script; `about`: what to get for a set that is not there.
    """

    hub_id: str | None
    dataset_format: str
    files: str | None = None
    revision: str | None = None
    about: str = ""


PARQUET = "refs/convert/parquet"
NAMED_SETS = {
    "alpaca": NamedSet("tatsu-lab/alpaca", "alpaca"),
    "alpaca-clean": NamedSet("yahma/alpaca-cleaned", "alpaca"),
    "chip2": NamedSet("laion/OIG", "chip2", files="unified_chip2.jsonl"),
    "self-instruct": NamedSet(
        "yizhongw/self_instruct", "self-instruct", files="self_instruct/train/*.parquet", revision=PARQUET
    ),
    "hh-rlhf": NamedSet("Anthropic/hh-rlhf", "hh-rlhf"),
    "longform": NamedSet("akoksal/LongForm", "longform"),
    "oasst1": NamedSet("timdettmers/openassistant-guanaco", "oasst1"),
    "vicuna": NamedSet(
        "anon8231489123/ShareGPT_Vicuna_unfiltered",
        "vicuna",
        files="ShareGPT_V3_unfiltered_cleaned_split.json",
    ),
    "evol_instruct": NamedSet("WizardLMTeam/WizardLM_evol_instruct_V2_196k", "evol_instruct"),
    "dolly-15k": NamedSet("databricks/databricks-dolly-15k", "dolly"),
    "olcc": NamedSet(None, "olcc", about="OL-CC, Openlabel Chinese Conversations, by BAAI (data.baai.ac.cn)"),
}
