"""What --dataset_name means: names, hub ids, files, folders, globs, samples; and what to do where it fails."""

import json

import pytest
from helpers import ROOT
from helpers.formats import COLUMNS, GOLDEN, JUNK, list_turns
from helpers.rows import alpaca_rows, list_questions, load, write_rows
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from utils.arguments import DataArguments
from utils.console import UserError
from utils.data.formats import ALIASES
from utils.data.local_files import find_files
from utils.data.named_sets import NAMED_SETS
from utils.data.sources import find_sources, load_sample_prompts
from utils.prompts.messages import EVAL, TEST, TRAIN

# Each named set's file as its publisher calls it, and a row in its own columns.
PUBLISHED = {
    "alpaca": (
        "alpaca/data/train-00000-of-00001.parquet",
        {"instruction": "q", "input": "", "output": "a", "text": "Below is ..."},
        ["u:q", "a:a"],
    ),
    "alpaca-clean": (
        "alpaca-cleaned/alpaca_data_cleaned.json",
        {"instruction": "q", "input": "i", "output": "a"},
        ["u:q\n\ni", "a:a"],
    ),
    "chip2": ("unified_chip2.jsonl", *GOLDEN["chip2"]),
    "self-instruct": (
        "self_instruct/self_instruct/train/0000.parquet",
        {"prompt": "q", "completion": "a"},
        ["u:q", "a:a"],
    ),
    "hh-rlhf": ("Anthropic/hh-rlhf/harmless-base/train.jsonl.gz", *GOLDEN["hh-rlhf"]),
    "longform": (
        "LongForm/dataset/train.jsonl",
        {"input": "q", "output": "a", "source": "C4", "subset": "c4"},
        ["u:q", "a:a"],
    ),
    "oasst1": ("openassistant-guanaco/openassistant_best_replies_train.jsonl", *GOLDEN["oasst1"]),
    "vicuna": ("ShareGPT_V3_unfiltered_cleaned_split.json", *GOLDEN["sharegpt"]),
    "evol_instruct": (
        "WizardLM_evol_instruct_V2_196k/WizardLM_evol_instruct_V2_143k.json",
        {
            "idx": "x",
            "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}],
        },
        ["u:q", "a:a"],
    ),
    "dolly-15k": ("databricks-dolly-15k/databricks-dolly-15k.jsonl", *GOLDEN["dolly"]),
    "olcc": ("olcc.json", {"instruction": "问", "output": "答"}, ["u:问", "a:答"]),
}


def test_every_named_set_has_a_fixture():
    assert PUBLISHED.keys() == NAMED_SETS.keys()


@pytest.mark.parametrize("name", PUBLISHED)
def test_named_set_is_found_in_its_local_copy_and_read(tmp_path, name):
    file, row, turns = PUBLISHED[name]
    write_rows(tmp_path / file, [row, row | {"id": 2}])
    rows = load(name, data_dir=str(tmp_path), load_from_local=True)
    chats = [chat for _, _, _, chat in rows.read("\n\n")]
    assert len(chats) == 2 and list_turns(chats[0]) == turns
    wanted = NAMED_SETS[name].dataset_format
    assert rows.sources[0].dataset_format == wanted or ALIASES[wanted] == rows.sources[0].dataset_format


@pytest.mark.parametrize("name", PUBLISHED)
def test_named_set_out_of_reach_says_what_to_download_and_where_to_put_it(name):
    with pytest.raises(UserError, match=f"DIR/{name}/ and add --load_from_local --data_dir DIR") as caught:
        find_sources(name, DataArguments())
    assert (NAMED_SETS[name].hub_id or "BAAI") in str(caught.value)


def test_named_set_missing_in_the_local_folder_names_what_was_looked_for(tmp_path):
    with pytest.raises(UserError, match="holds no olcc: download OL-CC"):
        load("olcc", data_dir=str(tmp_path), load_from_local=True)


def test_local_copy_is_the_named_set_and_not_its_neighbours(tmp_path):
    for name in ("alpaca-clean.json", "alpaca_gpt4_zh.json", "alpaca-train.json", "alpaca.json"):
        write_rows(tmp_path / name, alpaca_rows(3))
    write_rows(tmp_path / "OIG" / "unified_chip2.jsonl", [{"text": "<human>: Who?\n<bot>: Guanaco."}])
    write_rows(tmp_path / "OIG" / "unified_other.jsonl", alpaca_rows(3))
    local = DataArguments(data_dir=str(tmp_path), load_from_local=True)
    assert [path.name for path in find_files("alpaca", local)] == ["alpaca-train.json", "alpaca.json"]
    assert [path.name for path in find_files("chip2", local)] == ["unified_chip2.jsonl"]
    (tmp_path / "alpaca-train.json").unlink()
    (tmp_path / "alpaca.json").unlink()
    with pytest.raises(UserError, match="holds no alpaca"):
        find_files("alpaca", local)


def test_hub_id_with_config_and_split_is_no_local_path():
    for name in ("org/name", "org/name:config", "org/name:config[test]", "org/name[train]", "oasst1[test]"):
        with pytest.raises(UserError, match="HF_HUB_OFFLINE"):
            find_sources(name, DataArguments())


def test_hub_id_without_the_config_that_its_colon_promises_is_refused():
    with pytest.raises(UserError, match="--dataset_name org/name:: .* ORG/NAME:CONFIG"):
        find_sources("org/name:", DataArguments())


def test_files_folders_globs_and_lists_of_them_are_read_in_order(tmp_path):
    for i in range(3):
        write_rows(tmp_path / "set" / f"part-{i}.jsonl", alpaca_rows(2, start=2 * i))
    write_rows(tmp_path / "more.csv", [])
    (tmp_path / "more.csv").write_text("prompt,completion\nQuestion 6?,x\n")
    expected = [f"Question {i}?" for i in range(6)]
    assert list_questions(load(tmp_path / "set")) == expected
    assert list_questions(load(f"{tmp_path}/set/part-*.jsonl")) == expected
    assert list_questions(load(f"{tmp_path}/set/part-[02].jsonl")) == expected[:2] + expected[4:]
    both = load(f"{tmp_path}/set,{tmp_path}/more.csv")
    assert list_questions(both) == [*expected, "Question 6?"]
    assert [source.dataset_format for source in both.sources] == ["alpaca"] * 3 + ["self-instruct"]


def test_count_behind_a_name_draws_a_seeded_sample(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", alpaca_rows(100))
    first, again, other = load(f"{path}#10"), load(f"{path}#10"), load(f"{path}#10", data_seed=1)
    assert len(list_questions(first)) == 10 and list_questions(first) == list_questions(again)
    assert list_questions(first) != list_questions(other)
    assert list_questions(first) != [f"Question {i}?" for i in range(10)]


def test_counts_of_one_file_are_drawn_apart_and_count_together(tmp_path, capsys):
    path = write_rows(tmp_path / "rows.jsonl", alpaca_rows(100))
    more = write_rows(tmp_path / "more.jsonl", alpaca_rows(100, start=100))
    both = list_questions(load(f"{path}#10,{more}#5,{path}#20"))
    assert len(both) == len(set(both)) == 35
    assert both[:10] == list_questions(load(f"{path}#10"))  # what one count draws does not hang on the others
    assert len(list_questions(load(f"{path}#10,{path}"))) == 110  # all rows, and ten of them twice
    assert "takes all" not in capsys.readouterr().out
    assert len(list_questions(load(f"{path}#90,{path}#90"))) == 100
    assert f"{path}#90 takes all of the 10 rows that are there to draw" in capsys.readouterr().out


def test_count_behind_a_name_for_evaluation_draws_a_sample(tmp_path, capsys):
    path = write_rows(tmp_path / "rows.jsonl", alpaca_rows(30))
    apart = write_rows(tmp_path / "apart.jsonl", alpaca_rows(30, start=20))
    rows = load(f"{path}#15", do_eval=True, eval_dataset_name=f"{apart}#7")
    assert "30 rows, format alpaca, 15 of them drawn\n" in capsys.readouterr().out
    assert (rows.count(TRAIN), rows.count(EVAL)) == (15, 7)
    assert list_questions(rows, EVAL) == list_questions(load(f"{apart}#7"))
    # No row of that file is trained on, drawn or not.
    assert not set(list_questions(rows)) & {f"Question {i}?" for i in range(20, 50)}


def test_what_a_folder_leaves_out_is_said(tmp_path, capsys):
    for name in ("train.json", "test.json", "dataset_info.json"):
        write_rows(tmp_path / "set" / name, alpaca_rows(3, start=10 * len(name)))
    for name in ("notes.md", "old/rows.xlsx", ".gitattributes", "README_zh.txt", "requirements.txt"):
        (tmp_path / "set" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "set" / name).write_text("x")
    load(tmp_path / "set")
    said = capsys.readouterr().out
    others = "README_zh.txt, dataset_info.json, notes.md, old/rows.xlsx, requirements.txt"
    assert f"by their names no files of rows: {others}\n" in said
    assert "by their names not trained on: test.json (" in said and ".gitattributes" not in said
    other = write_rows(tmp_path / "other.json", alpaca_rows(3))
    load(other, do_eval=True, eval_dataset_name=str(tmp_path / "set"))
    assert "not trained on" not in capsys.readouterr().out


def test_zip_file_is_the_folder_it_holds(tmp_path, capsys):
    from zipfile import ZipFile

    folder = tmp_path / "plain"
    write_rows(folder / "a" / "train.jsonl", alpaca_rows(20))
    write_rows(folder / "a" / "test.jsonl.gz", alpaca_rows(4, start=18))
    (folder / "readme.md").write_text("x")
    with ZipFile(tmp_path / "set.zip", "w") as archive:
        for path in sorted(folder.rglob("*.*")):
            archive.write(path, path.relative_to(folder))
        archive.writestr("__MACOSX/a/._train.jsonl", b"\0")
    zipped, plain = load(tmp_path / "set.zip", do_eval=True), load(folder, do_eval=True)
    assert "no files of rows: readme.md" in capsys.readouterr().out
    for part in (TRAIN, EVAL):
        assert list_questions(zipped, part) == list_questions(plain, part) != []
    assert [source.digest for source in zipped.sources] == [source.digest for source in plain.sources]
    assert list_questions(load(f"{tmp_path}/*.zip")) == list_questions(plain)
    assert len(list_questions(load(f"{tmp_path}/set.zip/a/test.jsonl.gz"))) == 4
    with ZipFile(tmp_path / "none.zip", "w") as archive:
        archive.writestr("table.xlsx", b"x")
    with pytest.raises(UserError, match="the zip file holds no .json.* but table.xlsx"):
        load(tmp_path / "none.zip")


@pytest.mark.parametrize("dataset_format", [None, "alpaca"])
@pytest.mark.parametrize(
    ("at", "byte", "reason"),
    [
        (60, 255, "rows.jsonl is damaged in its zip file"),
        (-1, 0, "is a damaged zip file"),
        (6, 1, "a password"),
    ],
)
def test_zip_file_that_cannot_be_unpacked_is_one_clear_line(tmp_path, dataset_format, at, byte, reason):
    from zipfile import ZipFile

    with ZipFile(tmp_path / "set.zip", "w") as archive:
        archive.writestr("rows.jsonl", "\n".join(json.dumps(row) for row in alpaca_rows(9)))
    data = bytearray((tmp_path / "set.zip").read_bytes())
    data[at] = byte
    if reason == "a password":  # a flag of the file, which its entry in the list has too
        data[data.index(b"PK\x01\x02") + 8] = byte
    (tmp_path / "set.zip").write_bytes(data if at > 0 else data[:300])
    with pytest.raises(UserError, match=reason) as caught:
        load(tmp_path / "set.zip", dataset_format=dataset_format)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("joined", ["{}，{}", "“{}”", "{}、{}", "{};{}", "'{}'", "{}＃2"])
def test_odd_comma_or_quotation_mark_in_a_list_of_files_is_named(tmp_path, joined):
    files = [write_rows(tmp_path / name, alpaca_rows(3)) for name in ("a.json", "b.json")]
    mark = joined.replace("{}", "")[0]
    with pytest.raises(
        UserError, match=f"no such file; it holds {mark} where . is meant|{mark} where nothing"
    ):
        load(joined.format(*files))
    with pytest.raises(UserError, match=f"it holds {mark}"):
        load(joined.format("oasst1", "alpaca"))
    odd = write_rows(tmp_path / "a，b.json", alpaca_rows(3))
    assert load(odd).count(TRAIN) == 3  # a name may have it


def test_held_out_file_is_what_a_word_of_its_name_says(tmp_path):
    """`contest` and `latest` hold the letters of test and are no such word."""
    write_rows(tmp_path / "set" / "latest.json", alpaca_rows(20))
    write_rows(tmp_path / "set" / "contest-dev.json", alpaca_rows(4, start=20))
    write_rows(tmp_path / "set" / "Test.json", alpaca_rows(3, start=24))
    rows = load(tmp_path / "set", do_eval=True, do_predict=True)
    assert [rows.count(part) for part in (TRAIN, EVAL, TEST)] == [20, 4, 3]


def test_held_out_files_of_a_folder_are_not_trained_on(tmp_path):
    write_rows(tmp_path / "oasst1" / "openassistant_best_replies_train.jsonl", alpaca_rows(20))
    write_rows(tmp_path / "oasst1" / "openassistant_best_replies_eval.jsonl", alpaca_rows(4, start=20))
    train_only = load(tmp_path / "oasst1")
    assert len(list_questions(train_only)) == 20 and train_only.count(EVAL) == 0
    rows = load(tmp_path / "oasst1", do_eval=True)
    assert list_questions(rows, EVAL) == [f"Question {i}?" for i in range(20, 24)]
    both = load(tmp_path / "oasst1", do_eval=True, do_predict=True)
    assert (both.count(EVAL), both.count(TEST)) == (2, 2)


FAILS = {
    "nothing.jsonl": "no such file",
    "./no/such": "no such file",
    "no-such-name": "or one of alpaca, alpaca-clean",
    "rows*.jsonl": "matches no file",
    "empty-folder": "the folder holds no .json",
}


@pytest.mark.parametrize("name", FAILS)
def test_name_that_means_nothing_says_what_would(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty-folder").mkdir()
    (tmp_path / "empty-folder" / "note.md").write_text("no rows")
    with pytest.raises(UserError, match=FAILS[name]):
        load(name)


@pytest.mark.parametrize("name", [*FAILS, "rows.jsonl#0", "org/name", "olcc", "none.zip"])
def test_wrong_name_for_evaluation_is_told_by_its_own_flag(tmp_path, monkeypatch, name):
    from zipfile import ZipFile

    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty-folder").mkdir()
    ZipFile(tmp_path / "none.zip", "w").close()
    path = write_rows(tmp_path / "train.json", alpaca_rows(3))
    with pytest.raises(UserError) as caught:
        load(path, do_eval=True, eval_dataset_name=name)
    assert str(caught.value).startswith(f"--eval_dataset_name {name}")
    assert "--dataset_name" not in str(caught.value)


def test_unknown_columns_are_named_with_the_flag_that_says_which_is_which(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [{"frage": "q", "reply": "a"}])
    with pytest.raises(
        UserError, match="has the columns frage, reply.*--columns instruction=frage,output=reply"
    ):
        load(path)


def test_bad_rows_are_counted_with_their_numbers_and_the_good_kept(tmp_path, capsys):
    good = alpaca_rows(3)
    bad = [
        {"instruction": "q", "output": None},
        7,
        {"instruction": "q"},
        {"instruction": "\ud800", "output": "a"},
    ]
    path = tmp_path / "rows.jsonl"
    mixed = [good[0], bad[0], good[1], bad[1], bad[2], good[2], bad[3]]
    path.write_text("\n".join(json.dumps(row) for row in mixed))
    rows = load(path)
    assert list_questions(rows) == [f"Question {i}?" for i in range(3)]
    (scan,) = rows.scans
    assert sorted(number for _, numbers in scan.bad.values() for number in numbers) == [2, 4, 5, 7]
    assert "4 left out in all" in capsys.readouterr().out or len(scan.bad) <= 3


def test_file_without_one_usable_row_is_refused(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [{"instruction": "q", "output": ""}] * 3)
    with pytest.raises(UserError, match="no row can be used; row 1: column 'output' is empty"):
        load(path)


def test_sample_prompts_are_prompts_or_messages(tmp_path):
    assert len(load_sample_prompts(ROOT / "data" / "sample_prompts.jsonl")) == 4
    path = tmp_path / "prompts.jsonl"
    path.write_text(
        '{"prompt": "a"}\n{"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "b"}]}'
    )
    assert [[m["content"] for m in chat] for chat in load_sample_prompts(str(path))] == [["a"], ["s", "b"]]
    path.write_text('{"question": "a"}')
    with pytest.raises(UserError, match="row 1 must be"):
        load_sample_prompts(str(path))


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(junk=st.lists(st.dictionaries(st.sampled_from(COLUMNS.split()), JUNK, max_size=5) | JUNK, max_size=12))
def test_every_good_row_among_random_ones_is_kept_and_every_bad_one_numbered(tmp_path, junk):
    mixed = [row for pair in zip(alpaca_rows(len(junk)), junk, strict=True) for row in pair] + alpaca_rows(1)
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in mixed))
    rows = load(path, dataset_format="alpaca")
    (scan,) = rows.scans
    bad = sorted(number for _, numbers in scan.bad.values() for number in numbers)
    assert all(number % 2 == 0 for number in bad)  # our own rows have the odd numbers
    assert len(bad) == sum(count for count, _ in scan.bad.values()) == (scan.hashes == 0).sum()
    assert len(list(rows.read("\n\n"))) == len(mixed) - len(bad)


def test_one_megabyte_strings_go_through(tmp_path, smol_tokenizer, monkeypatch):
    from helpers.chats import build_chat_tokenizer

    from utils.data.tokenizing import tokenize_rows

    monkeypatch.setenv("QLORA_CACHE", str(tmp_path / "cache"))
    path = write_rows(
        tmp_path / "rows.jsonl", [{"instruction": "长 " * 500_000, "output": "word " * 200_000}]
    )
    data_args = DataArguments(str(path), model_max_length=64)
    found = tokenize_rows(load(path), build_chat_tokenizer(smol_tokenizer), data_args)[TRAIN]
    assert found.lengths.tolist() == [64]
