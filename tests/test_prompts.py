"""Prompt files of every format, their errors, and which prompts an iteration takes."""

import json
import sys
import types
from pathlib import Path

import pytest

from chunk_grpo_nb.prompts import Prompt, PromptError, load_prompts, prompt_batch


def write(folder, name: str, content: str | bytes):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


FORMATS = {
    "a.txt": "a cat\r\n\n  a dog \n",
    "a.jsonl": '{"prompt": "a cat"}\n\n{"prompt": "a dog"}\n',
    "a.json": '["a cat", "a dog"]',
    "b.json": '[{"Prompt": "a cat"}, {"Prompt": "a dog"}]',
    "a.csv": "n,Prompt\n1,a cat\n2,a dog\n",
    "a.tsv": "caption\tn\na cat\t1\na dog\t2\n",
    "bom.txt": b"\xef\xbb\xbfa cat\na dog",
}


@pytest.mark.parametrize("name", FORMATS)
def test_formats_give_the_same_prompts(tmp_path, name):
    path = write(tmp_path, name, FORMATS[name])
    assert [p.text for p in load_prompts(path)] == ["a cat", "a dog"]
    assert [p.text for p in load_prompts(str(path), limit=1)] == ["a cat"]


def test_parquet(tmp_path):
    import pandas as pd

    pd.DataFrame({"text": ["a cat", "a dog"], "n": [1, 2]}).to_parquet(tmp_path / "a.parquet")
    assert load_prompts(tmp_path / "a.parquet")[1] == Prompt("a dog", {"n": 2})
    with pytest.raises(PromptError, match="not a readable Parquet"):
        load_prompts(write(tmp_path, "b.parquet", "nonsense"))


# ---------------------------------------------------------------- layouts of the benchmarks

EXCERPTS = Path(__file__).parent / "prompt_files"  # written anew in the layouts of the originals


def test_partiprompts_keep_their_unquoted_quotation_marks():
    prompts = load_prompts(EXCERPTS / "PartiPrompts.tsv")
    assert [p.text[:9] for p in prompts] == ["tide", '"O P E N"', "A chalk d", "A crew ca"]
    assert prompts[3].metadata["Note"] == 'Variant of "Night Owls"'


def test_tsv_quoted_as_pandas_does(tmp_path):
    import pandas as pd

    texts = ['"HI" on a wall', "a\ttab", "two\nlines", "plain"]
    pd.DataFrame({"prompt": texts}).to_csv(tmp_path / "a.TSV", sep="\t", index=False)
    assert [p.text for p in load_prompts(tmp_path / "a.TSV")] == texts


def geneval_prompts():
    return load_prompts(EXCERPTS / "geneval", split="train")


def test_geneval_metadata_is_what_stands_in_the_file():
    lines = (EXCERPTS / "geneval" / "train_metadata.jsonl").read_text().splitlines()
    for prompt, line in zip(geneval_prompts(), lines, strict=True):
        assert {**prompt.metadata, "prompt": prompt.text} == json.loads(line)


@pytest.mark.parametrize("form", ["parquet", "datasets", "jsonl"])
def test_geneval_metadata_survives_formats_that_fill_gaps_with_null(tmp_path, monkeypatch, form):
    import pandas as pd
    import pyarrow as pa
    import pyarrow.parquet as pq

    records = [{**p.metadata, "prompt": p.text} for p in geneval_prompts()]
    records = [r for r in records if r["tag"] != "position"]  # Arrow has no list of text and number
    path = tmp_path / f"geneval.{form}"
    if form == "jsonl":
        pd.DataFrame(records).to_json(path, orient="records", lines=True)
        assert '"exclude":null' in path.read_text()  # the gap that must not arrive
    rows = pa.Table.from_pylist([{"exclude": None, **r} for r in records])
    if form == "parquet":
        pq.write_table(rows, path)
    if form == "datasets":
        fake = types.SimpleNamespace(load_dataset=lambda name, split: rows.to_pylist())
        monkeypatch.setitem(sys.modules, "datasets", fake)
        path = "owner/geneval"
    assert [{**p.metadata, "prompt": p.text} for p in load_prompts(path)] == records


def test_hpdv2_is_one_list_per_style():
    styles = [(p.text[:5], p.metadata["style"]) for p in load_prompts(EXCERPTS / "hpdv2")]
    assert styles == [("a fox", "anime"), ("two p", "anime"), ("a har", "concept-art")]


def test_dpg_bench_from_its_folder_and_from_its_table():
    folder, table = (load_prompts(EXCERPTS / name) for name in ("dpg_bench", "dpg_bench.csv"))
    assert [p.metadata["name"] for p in folder] == ["0", "partiprompts3"]
    assert "\n" in folder[0].text
    assert [p.metadata["name"] for p in table] == ["0", "partiprompts3"]
    questions = table[0].metadata["questions"]
    asked = [q["question_natural_language"] for q in questions]
    assert asked == ["Is there a table?", "Is the table wooden?"]


def test_wise_keeps_its_numbers():
    assert [p.metadata["prompt_id"] for p in load_prompts(EXCERPTS / "wise.json")] == [1, 2]


def test_text_sets_of_flow_grpo():
    assert len(load_prompts(EXCERPTS / "pickscore", split="train")) == 2
    ocr = load_prompts(EXCERPTS / "ocr", split="train")
    assert ocr[1].text == 'A 27" monitor saying "HELLO" on a desk.'


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1e"])
@pytest.mark.parametrize("suffix", ["txt", "jsonl", "csv", "tsv", "json"])
def test_lines_end_at_line_feeds_and_carriage_returns_alone(tmp_path, mark, suffix):
    text = f"a{mark}b"
    quoted = json.dumps(text, ensure_ascii=False) if mark > " " else json.dumps(text)
    content = {
        "txt": f"{text}\r\nc\rd\n",
        "jsonl": f'{{"prompt": {quoted}}}\r\n"c"\n"d"\n',
        "csv": f"prompt\n{text}\nc\nd\n",
        "tsv": f"prompt\tn\n{text}\t1\nc\t2\nd\t3\n",
        "json": f'[{quoted}, "c", "d"]',
    }[suffix]
    prompts = load_prompts(write(tmp_path, f"a.{suffix}", content))
    assert [p.text for p in prompts] == [text, "c", "d"]


@pytest.mark.parametrize("name", FORMATS)
def test_suffixes_in_upper_case(tmp_path, name):
    path = write(tmp_path, name.upper(), FORMATS[name])
    assert [p.text for p in load_prompts(path)] == ["a cat", "a dog"]


def test_upper_case_names_in_folders(tmp_path):
    assert load_prompts(write(tmp_path, "dpg/0.TXT", "one").parent)[0].text == "one"
    assert load_prompts(write(tmp_path, "hpd/A.JSON", '["two"]').parent)[0].text == "two"
    splits = write(tmp_path, "ocr/TRAIN.TXT", "three").parent
    assert load_prompts(splits, split="train")[0].text == "three"
    with pytest.raises(PromptError, match="holds splits"):
        load_prompts(splits)


def test_hidden_files_of_a_folder_are_no_prompts(tmp_path):
    write(tmp_path, "._0.txt", b"\x00\x05")
    write(tmp_path, "0.txt", "one")
    assert [p.text for p in load_prompts(tmp_path)] == ["one"]


def test_splits(tmp_path):
    folder = write(tmp_path, "ocr/train.txt", "one").parent
    write(tmp_path, "ocr/test_metadata.jsonl", '{"prompt": "two", "tag": "t"}')
    write(tmp_path, "ocr/test.txt", "plain")
    assert load_prompts(folder, split="train")[0].text == "one"
    assert load_prompts(folder, split="test")[0].text == "plain"
    with pytest.raises(PromptError, match="holds splits"):
        load_prompts(folder)
    with pytest.raises(PromptError, match="no file for the split 'dev'"):
        load_prompts(folder, split="dev")
    file = write(
        tmp_path,
        "all.jsonl",
        '{"prompt": "a", "split": "train"}\n{"prompt": "b", "split": "test"}\n',
    )
    assert [p.text for p in load_prompts(file, split="test")] == ["b"]
    with pytest.raises(PromptError, match="no field `split`"):
        load_prompts(folder / "train.txt", split="train")


BROKEN = {
    "empty.txt": (b" \n\n", "no prompts inside"),
    "latin.txt": (b"fine\nfine\ncaf\xe9", "line 3: not UTF-8 .byte 0xe9."),
    "utf16.jsonl": ('{"prompt": "a"}'.encode("utf-16"), "line 1: not UTF-8"),
    "cut.jsonl": (b'{"prompt": "a"}\n\n{"prompt": \n', "line 3: not JSON"),
    "list.jsonl": (b'{"prompt": "a"}\n[1]\n', "line 2: expected an object"),
    "key.jsonl": (b'{"promt": "a"}\n', "line 1: no prompt among the fields .'promt'."),
    "blank.jsonl": (b'{"prompt": "a"}\n{"prompt": "  "}\n', "line 2: the prompt is '  '"),
    "number.jsonl": (b'{"prompt": 3}\n', "line 1: the prompt is 3"),
    "cut.json": (b'["a",\n "b"', "line 2: not JSON"),
    "string.json": (b'"a"', "expected a list of prompts, found str"),
    "ragged.csv": (b"prompt,n\na,1\nb,2,3\n", "line 3: the header has 2 columns"),
    "short.csv": (b"prompt,n\na\n", "line 2: the header has 2 columns"),
    "quote.csv": (b'prompt,n\nx,0\n"a,1\nb,2\n', "line 3: .*left open"),
    "header.csv": (b"title,n\na,1\n", "line 2: no prompt among"),
    "a.pdf": (b"x", "unknown kind of file '.pdf'"),
    "deep.json": (b"[" * 100_000, "not JSON that can be read"),
    "deep.jsonl": (b'"a"\n' + b'{"a":' * 100_000, "line 2: not JSON that can be read"),
    "digits.json": (b'[{"prompt": "a", "n": ' + b"9" * 5000 + b"}]", "not JSON that can be read"),
    "half.json": (b'["\\ud800"]', "entry 1: .* half a surrogate pair"),
    "twice.csv": (b"prompt,prompt\na,b\n", "column 'prompt' occurs twice"),
    "ragged.tsv": (b'prompt\tn\n"a" b\t1\nc\n', "line 2: .*quotation mark"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_name_the_line(tmp_path, name):
    content, message = BROKEN[name]
    path = write(tmp_path, name, content)
    with pytest.raises(PromptError, match=message) as error:
        load_prompts(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "txt"])
def test_huge_or_wild_content_gives_a_short_plain_message(tmp_path, suffix):
    wild = "\x1b[2J" + "x" * 1_000_000
    content = {
        "jsonl": wild,
        "json": wild,
        "csv": wild.replace("x", "\x1b", 1) + "\na\n",
        "txt": "a",
    }[suffix]
    path = write(tmp_path, f"a.{suffix}", content)
    with pytest.raises(PromptError) as error:
        load_prompts(path, split="test" if suffix == "txt" else None)
    assert len(str(error.value)) < 600 and "\x1b" not in str(error.value)


@pytest.mark.parametrize(
    "source",
    [None, "", "  ", ["a.txt"], 3, b"a.txt", "x" * 300, "x" * 300 + ".txt", "a\0b.txt", "\x1b[2J"],
)
def test_sources_that_are_none(source):
    with pytest.raises(PromptError) as error:
        load_prompts(source)
    assert len(str(error.value)) < 400 and "\x1b" not in str(error.value)


def test_a_file_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path, "a.txt", "one")
    assert load_prompts("~/a.txt") == [Prompt("one")]


def test_pictures_of_a_parquet_file_are_left_out(tmp_path):
    import pandas as pd

    table = pd.DataFrame({"caption": ["a", "b"], "jpg_0": [b"x", b"y"], "n": [1, 2]})
    table[table.n > 1].to_parquet(tmp_path / "a.parquet")
    assert load_prompts(tmp_path / "a.parquet") == [Prompt("b", {"n": 2})]


def test_absent_sources(tmp_path, monkeypatch):
    for source in (tmp_path / "no.txt", "no.jsonl", "data/prompts/no.jsonl", "noslash"):
        with pytest.raises(PromptError, match="no prompt file at"):
            load_prompts(source)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(PromptError, match=r"pip install chunk_grpo_nb\[data\]"):
        load_prompts("owner/dataset")
    with pytest.raises(PromptError, match="limit is 0"):
        load_prompts(tmp_path, limit=0)


def test_dataset_ids_go_through_datasets(monkeypatch):
    rows = {"train": [{"caption": "a cat", "id": 1}], "test": [{"caption": ""}]}
    fake = types.SimpleNamespace(load_dataset=lambda name, split: rows[split])
    monkeypatch.setitem(sys.modules, "datasets", fake)
    assert load_prompts("owner/dataset") == [Prompt("a cat", {"id": 1})]
    with pytest.raises(PromptError, match="owner/dataset, row 1: the prompt is ''"):
        load_prompts("owner/dataset", split="test")
    with pytest.raises(PromptError, match="split 'dev', could not be loaded"):
        load_prompts("owner/dataset", split="dev")


def test_batches_cover_an_epoch_without_repeats():
    epochs = [[prompt_batch(12, 4, 7, 3 * e + i) for i in range(3)] for e in range(3)]
    assert all(sorted(sum(epoch, [])) == list(range(12)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert prompt_batch(12, 4, 7, 5) == prompt_batch(12, 4, 7, 5) != prompt_batch(12, 4, 8, 5)


@pytest.mark.parametrize(
    "num_prompts, count", [(1, 1), (5, 5), (7, 3), (480, 16), (3, 7), (2, 4), (1, 3)]
)
def test_batches_have_no_avoidable_repeats(num_prompts, count):
    for iteration in range(20):
        batch = prompt_batch(num_prompts, count, 0, iteration)
        assert len(batch) == count and set(batch) <= set(range(num_prompts))
        counts = [batch.count(i) for i in range(num_prompts)]
        assert max(counts) - min(counts) <= 1


def test_leftover_prompts_change_from_epoch_to_epoch():
    seen = {i for iteration in range(8) for i in prompt_batch(7, 3, 0, iteration)}
    assert seen == set(range(7))


@pytest.mark.parametrize("arguments", [(0, 1, 0, 0), (3, 0, 0, 0), (3, 1, 0, -1)])
def test_impossible_batches_are_refused(arguments):
    with pytest.raises(ValueError, match="at least"):
        prompt_batch(*arguments)
