"""Prompt files of every format, their errors, and which prompts an iteration takes."""

import json

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


def test_benchmark_formats_keep_their_metadata(tmp_path):
    geneval = {
        "tag": "position",
        "include": [
            {"class": "dog", "count": 1},
            {"class": "cup", "count": 1, "position": ["left of", 0]},
        ],
        "prompt": "a photo of a cup left of a dog",
    }
    (prompt,) = load_prompts(write(tmp_path, "evaluation_metadata.jsonl", json.dumps(geneval)))
    assert (
        prompt.text == geneval["prompt"] and {**prompt.metadata, "prompt": prompt.text} == geneval
    )
    (parti,) = load_prompts(
        write(
            tmp_path,
            "PartiPrompts.tsv",
            'Prompt\tCategory\tChallenge\tNote\na "storm"\tArts\tBasic\t\n',
        )
    )
    assert parti.metadata["Category"] == "Arts"
    wise = [
        {
            "Prompt": "the fruit of Newton",
            "Explanation": "apple",
            "Category": "Cultural",
            "Subcategory": "x",
            "prompt_id": 7,
        }
    ]
    assert (
        load_prompts(write(tmp_path, "wise.json", json.dumps(wise)))[0].metadata["prompt_id"] == 7
    )
    hpd = write(tmp_path, "hpd/anime.json", '["a fox"]').parent
    write(tmp_path, "hpd/photo.json", '["a street"]')
    assert [(p.text, p.metadata["style"]) for p in load_prompts(hpd)] == [
        ("a fox", "anime"),
        ("a street", "photo"),
    ]
    dpg = write(tmp_path, "dpg/3.txt", "a long\nprompt").parent
    assert load_prompts(dpg) == [Prompt("a long\nprompt", {"name": "3"})]


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
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_name_the_line(tmp_path, name):
    content, message = BROKEN[name]
    path = write(tmp_path, name, content)
    with pytest.raises(PromptError, match=message) as error:
        load_prompts(path)
    assert str(path) in str(error.value)


def test_absent_sources(tmp_path, monkeypatch):
    for source in (tmp_path / "no.txt", "no.jsonl", "data/prompts/no.jsonl", "noslash"):
        with pytest.raises(PromptError, match="no prompt file at"):
            load_prompts(source)
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(PromptError, match=r"pip install chunk_grpo_nb\[data\]"):
        load_prompts("owner/dataset")
    with pytest.raises(PromptError, match="limit is 0"):
        load_prompts(tmp_path, limit=0)


def test_dataset_ids_go_through_datasets(monkeypatch):
    import types

    rows = {"train": [{"caption": "a cat", "id": 1}], "test": [{"caption": ""}]}
    fake = types.SimpleNamespace(load_dataset=lambda name, split: rows[split])
    monkeypatch.setitem(__import__("sys").modules, "datasets", fake)
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
