"""Run folders: nothing is overwritten, nothing damaged is believed, rows and state go together."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import SafetensorError

from chunk_grpo_nb.training import records
from chunk_grpo_nb.training.checkpoints import (
    ResumeChanges,
    check_resume,
    find_checkpoint,
    list_checkpoints,
    load_checkpoint,
    newest_checkpoint,
    rewind,
    save_checkpoint,
    write_folder,
)
from chunk_grpo_nb.training.config import Config, make_config
from chunk_grpo_nb.training.records import (
    RunFolder,
    count_rows,
    hash_inputs,
    last_row,
    lock_run,
    log_row,
    read_rows,
    run_manifest,
    save_images,
)

NO_CHANGES = ResumeChanges({}, {})


@pytest.fixture
def run(tmp_path):
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    manifest = run_manifest(Config(), hashed={"prompts": tmp_path / "prompts.txt"})
    return RunFolder.create(tmp_path / "run", Config(), manifest)


def iterate(run, iteration, checkpoint=True):
    """What a training loop leaves behind in an iteration."""
    for update in range(2):
        log_row(run, {"iteration": iteration, "update": update})
    log_row(run, {"iteration": iteration, "seconds": 1.0}, "timings")
    if checkpoint:
        state = {"model": torch.ones(100) * (iteration + 1), "done": iteration + 1}
        return save_checkpoint(run, iteration + 1, state, keep=3)


def damage(path, how):
    content = bytearray(path.read_bytes())
    if how == "flipped bit":
        content[len(content) // 2] ^= 4
    elif how == "truncated":
        content = content[: len(content) // 2]
    elif how == "empty":
        content = b""
    path.write_bytes(content)
    if how == "gone":
        path.unlink()


@pytest.mark.parametrize("how", ["flipped bit", "truncated", "empty", "gone"])
def test_a_damaged_newest_is_reported_and_the_one_before_is_used(run, how):
    paths = [iterate(run, i) for i in range(2)]
    damage(paths[1], how)
    with pytest.warns(UserWarning, match="iteration_000002.*trying the one before"):
        found = newest_checkpoint(run)
    assert found.iteration == 1 and found.state["done"] == 1
    with pytest.raises((ValueError, FileNotFoundError), match="iteration_000002"):
        find_checkpoint(run, paths[1])


@pytest.mark.filterwarnings("ignore:.*trying the one before")
def test_checkpoints_that_are_all_gone_do_not_mean_start_over(run):
    for i in range(2):
        damage(iterate(run, i), "gone")
    with pytest.raises(ValueError, match="no checkpoint can be read.*iteration_000001"):
        newest_checkpoint(run)
    assert len(read_rows(run)) == 4


def test_a_run_killed_before_its_first_checkpoint_starts_over(run):
    log_row(run, {"iteration": 0, "reward": 0.5}, "validation")
    iterate(run, 0, checkpoint=False)
    assert newest_checkpoint(run) is None
    rewind(run, None, run.config, NO_CHANGES)
    assert count_rows(run) == {"metrics": 0, "timings": 0, "validation": 0}


def test_a_state_whose_index_was_not_written_does_not_count(run, monkeypatch):
    iterate(run, 0)
    iterate(run, 1, checkpoint=False)

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("chunk_grpo_nb.training.checkpoints._write_index", killed)
        with pytest.raises(KeyboardInterrupt):
            save_checkpoint(run, 2, {"model": torch.ones(1)})
    found = newest_checkpoint(run)
    assert found.iteration == 1
    rewind(run, found, run.config, NO_CHANGES)
    assert count_rows(run) == {"metrics": 2, "timings": 1}
    assert (run.path / "checkpoints/set_aside/iteration_000002.pt").exists()


def test_rows_after_the_checkpoint_never_happened(run):
    iterate(run, 0)
    log_row(run, {"iteration": 1, "update": 0})
    log_row(run, {"reward": 1}, "later")
    with open(run.path / "timings.jsonl", "a") as f:
        f.write('{"iteration": 1, "sec')
    rewind(run, newest_checkpoint(run), run.config, NO_CHANGES)
    iterate(run, 1)
    assert read_rows(run)["iteration"].tolist() == [0, 0, 1, 1]
    assert read_rows(run, "timings")["iteration"].tolist() == [0, 1]
    assert len(read_rows(run, "later")) == 0


def test_what_a_kill_left_half_written_is_removed(run):
    iterate(run, 0)
    halves = [run.path / "metrics.jsonl.tmp", run.path / "checkpoints/iteration_000002.pt.tmp"]
    for half in halves:
        half.write_bytes(b"half")
    (run.path / "policy.tmp").mkdir()
    rewind(run, newest_checkpoint(run), run.config, NO_CHANGES)
    assert not list(run.path.rglob("*.tmp")) and not list(run.path.rglob("set_aside"))


def test_a_folder_is_written_whole_or_stays_as_it_was(run):
    write_folder(run, "policy", lambda folder: (folder.mkdir(), (folder / "old").touch()))
    with pytest.raises(ZeroDivisionError):
        write_folder(run, "policy", lambda folder: (folder.mkdir(), 1 / 0))
    assert [path.name for path in (run.path / "policy").iterdir()] == ["old"]
    write_folder(run, "policy", lambda folder: (folder.mkdir(), (folder / "new").touch()))
    assert [path.name for path in (run.path / "policy").iterdir()] == ["new"]


@pytest.mark.parametrize("name", ["..", "../..", "", ".", "/etc", "a/b"])
def test_an_index_names_nothing_outside_its_folder(run, name):
    """Parts of old checkpoints are removed: of an index that someone else wrote, too."""
    iterate(run, 0)
    index = run.path / "checkpoints/index.json"
    entries = json.loads(index.read_text())
    next(iter(entries.values()))["parts"] = {name: "0" * 16}
    index.write_text(json.dumps(entries))
    with pytest.raises(ValueError, match="is damaged at"):
        newest_checkpoint(run)


@pytest.mark.parametrize("line", ["[1]", '"text"', "3", "null", "{"])
def test_lines_that_are_no_rows_are_named(run, line):
    (run.path / "metrics.jsonl").write_text('{"a": 1}\n' + line + "\n")
    with pytest.raises(ValueError, match="metrics.jsonl, line 2: not a row"):
        read_rows(run)


def test_rows_that_are_missing_are_named(run):
    iterate(run, 0)
    (run.path / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match="no checkpoint can be read"):
        with pytest.warns(UserWarning, match="0 rows, but 2"):
            newest_checkpoint(run)


def test_resuming_from_an_older_one_sets_the_newer_aside(run):
    paths = [iterate(run, i) for i in range(3)]
    rewind(run, find_checkpoint(run, paths[0]), run.config, NO_CHANGES)
    assert list_checkpoints(run) == paths[:1]
    assert newest_checkpoint(run).iteration == 1  # cut again here: not the stale third one
    assert sorted(p.name for p in (run.path / "checkpoints/set_aside").iterdir()) == [
        "iteration_000002.pt",
        "iteration_000003.pt",
    ]


def test_old_checkpoints_are_removed_with_their_parts(run):
    folder = run.path / "checkpoints"
    for i in (1, 2, 3):
        (folder / f"part_{i}").mkdir()
        (folder / f"part_{i}" / "weights").write_text(str(i))
        save_checkpoint(run, i, {"done": i}, keep=2, parts=[f"part_{i}"])
    assert sorted(p.name for p in folder.glob("part_*")) == ["part_2", "part_3"]
    (folder / "part_3" / "weights").write_text("4")
    with pytest.raises(ValueError, match="part_3 is damaged"):
        load_checkpoint(folder / "iteration_000003.pt")


@pytest.mark.parametrize("state", [{}, [1, 2], {"done": 1}])
def test_a_file_that_is_no_checkpoint_gets_words(tmp_path, state):
    torch.save(state, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="not a checkpoint of a run: it has no .*model"):
        load_checkpoint(tmp_path / "x.pt", needs=("done", "model"))


def test_a_pickle_is_not_executed(tmp_path):
    class Bad:
        def __reduce__(self):
            return os.system, ("touch executed",)

    torch.save(Bad(), tmp_path / "x.pt")
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        load_checkpoint(tmp_path / "x.pt")


def test_a_full_disk_leaves_the_checkpoints_before(run, monkeypatch):
    before = iterate(run, 0)

    def full(state, path):
        path.write_bytes(b"half")
        raise RuntimeError("enforce fail: No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="untouched"):
        iterate(run, 1)
    assert list_checkpoints(run) == [before]
    assert newest_checkpoint(run).iteration == 1 and not list(run.path.rglob("*.tmp"))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_is_named_with_what_could_not_be_written(run):
    """Rows and pictures, which are not written at one go, and the policy of safetensors."""
    (run.path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(OSError, match="could not write .*metrics.jsonl.*No space.*MB are free"):
        log_row(run, {"iteration": 1})
    (run.path / "samples/x.png").symlink_to("/dev/full")
    with pytest.raises(OSError, match="could not write .*x.png.*No space"):
        save_images(run, "x", [Image.new("RGB", (8, 8))], columns=1)

    def save(folder):
        raise SafetensorError("Error while serializing: I/O error: No space left on device")

    with pytest.raises(OSError, match="could not write .*policy.*No space"):
        write_folder(run, "policy", save)


def test_one_process_writes(run):
    code = (
        "import sys; from chunk_grpo_nb.training.records import *\n"
        "with lock_run(RunFolder.open(sys.argv[1])):\n    pass\n"
    )
    command = [sys.executable, "-c", code, str(run.path)]
    with lock_run(run):
        second = subprocess.run(command, capture_output=True, text=True)
        assert "is being written by another process" in second.stderr
    assert subprocess.run(command, capture_output=True).returncode == 0


def test_a_lock_that_was_left_is_free(run):
    lock = lock_run(run)
    with lock:
        pass
    with lock_run(run):
        pass


def test_checkpoints_of_an_older_version_are_refused_and_stay(run):
    path = save_checkpoint(run, 1, {"done": 1})
    path.with_name("index.json").unlink()
    with pytest.raises(ValueError, match="iteration_000001.pt but no index.json"):
        newest_checkpoint(run)
    assert path.is_file()


def test_a_first_checkpoint_that_was_cut_off_is_none(run):
    (run.path / "checkpoints/iteration_000001.pt").write_bytes(b"half")
    assert newest_checkpoint(run) is None


def test_changed_inputs_are_refused_with_both_hashes(run, tmp_path):
    (tmp_path / "prompts.txt").write_text("another prompt\n")
    hashes = hash_inputs({"prompts": tmp_path / "prompts.txt", "model": "some/hub-id"})
    then = run.manifest["hashes"]["prompts"]
    with pytest.raises(ValueError, match=f"{then}, now {hashes['prompts']}"):
        check_resume(run, run.config, hashes)
    changes = check_resume(run, run.config, hashes, allow_changed_inputs=True)
    rewind(run, None, run.config, changes)
    assert run.manifest["resumed"][0]["inputs"] == {"prompts": [then, hashes["prompts"]]}
    assert not check_resume(run, run.config, hashes).inputs, "allowed once, they are the inputs"


def test_more_iterations_are_written_down_or_refused(run):
    longer = make_config(iterations=99)
    changes = check_resume(run, longer, {})
    rewind(run, None, longer, changes)
    assert run.config == longer and run.manifest["resumed"][0]["settings"]["iterations"] == [40, 99]
    for stretched in ({"lr_schedule": "cosine"}, {"selection": "anneal"}):
        run.save_config(make_config(stretched))
        with pytest.raises(ValueError, match="iterations was 40, now 99.*stretched"):
            check_resume(run, make_config(stretched, longer), {})


@pytest.mark.parametrize(
    "place, words",
    [
        ("run", "holds a run already"),
        ("prompts.txt", "is not a folder"),
        ("prompts.txt/new", "is not a folder"),
        ("x" * 300, "cannot be a run folder"),
    ],
)
def test_a_folder_that_cannot_be_used_is_refused_untouched(run, tmp_path, place, words):
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(OSError, match=words):
        RunFolder.check_free(tmp_path / place)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("entry", ["[]", '{"a.pt": 3}', '{"a.pt": {"hash": 1}}', "{", "null"])
def test_a_damaged_index_gets_words(run, entry):
    path = iterate(run, 0)
    path.with_name("index.json").write_text(entry)
    for read in (newest_checkpoint, list_checkpoints, lambda _: load_checkpoint(path)):
        with pytest.raises(ValueError, match="index.json is damaged"):
            read(run)


def test_home_is_understood(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    run = RunFolder.create("~/run", Config(), {})
    assert run.path == tmp_path / "run"


def test_a_damaged_manifest_is_named(run):
    (run.path / "manifest.json").write_text("{" * 3)
    with pytest.raises(ValueError, match="manifest.json is damaged"):
        _ = run.manifest
    (run.path / "metrics.jsonl").write_text(json.dumps({"a": 1}) + "\n" + "oops\n")
    with pytest.raises(ValueError, match="metrics.jsonl, line 2"):
        read_rows(run)


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
