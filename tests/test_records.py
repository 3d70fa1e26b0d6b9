"""Records: what a run writes stays cheap to read while it grows."""

import pytest

from chunk_grpo_nb.training import records
from chunk_grpo_nb.training.records import RunFolder, last_row, log_row, read_rows


@pytest.mark.parametrize("words", [1, 5_000])
def test_the_last_row_is_read_without_the_others(tmp_path, monkeypatch, words):
    run = RunFolder(tmp_path)
    for iteration in range(50):
        log_row(run, {"iteration": iteration, "note": "word " * words})
    newest = read_rows(run).iloc[-1].to_dict()
    monkeypatch.setattr(records, "_read_jsonl", None)  # reading all rows would fail now
    assert last_row(run) == newest


def test_the_only_row_is_the_last(tmp_path):
    log_row(RunFolder(tmp_path), {"iteration": 0})
    assert last_row(RunFolder(tmp_path)) == {"iteration": 0}
