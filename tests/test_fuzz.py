"""Whatever a user may write or a disk may hold: read right, or refused in words; never a traceback.

FUZZ_EXAMPLES cases for each reader (100 unless set; `ci/full` takes thousands).
"""

import json
import os
import string
import unicodedata

import torch
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from test_sweep import write

from chunk_grpo_nb.analysis.arguments import parameter_values
from chunk_grpo_nb.analysis.notebooks import check_value, parse_parameters
from chunk_grpo_nb.analysis.sweep import load_sweep
from chunk_grpo_nb.chunking import make_chunker
from chunk_grpo_nb.prompts import load_prompts
from chunk_grpo_nb.rewards.combined import parse_weights
from chunk_grpo_nb.rewards.judges import read_rating, reply_text
from chunk_grpo_nb.shapes.scenes import parse_caption
from chunk_grpo_nb.training.checkpoints import (
    check_resume,
    load_checkpoint,
    newest_checkpoint,
    save_checkpoint,
)
from chunk_grpo_nb.training.config import flat, load_config, make_config, parse_yaml
from chunk_grpo_nb.training.records import RunFolder

REFUSALS = (ValueError, TypeError, FileNotFoundError)
fuzz = settings(
    max_examples=int(os.environ.get("FUZZ_EXAMPLES", "100")),
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
NAMES = sorted(flat(make_config({})))
SPECS = ("step", "sequence", "fixed", "uniform", "adaptive", "segment", "online", "only", "chunk")
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)
specs = st.builds(
    "{}{}{}".format,
    st.sampled_from(SPECS),
    st.sampled_from(["", ":", ",", "::", " "]),
    st.text(alphabet=string.digits + ",.-:ea²", max_size=8) | st.sampled_from(SPECS),
)


def refused_in_words(call, *arguments) -> bool:
    """True if the call is refused in words, False if it succeeds; anything else is raised."""
    try:
        call(*arguments)
    except REFUSALS as error:
        words = str(error)
        assert words.strip(), f"{type(error).__name__} without words"
        assert len(words) < 2_000, f"a message of {len(words)} characters"
        controls = {c for c in words if unicodedata.category(c) == "Cc"} - {"\n", "\t"}
        assert not controls, f"control characters {controls}"
        return True
    return False


@fuzz
@given(st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=10), values, max_size=3))
@example({"num_steps": int(1e18)})
def test_settings(chosen):
    refused_in_words(make_config, chosen)


@fuzz
@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
@example(b"a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]")
def test_config_files(tmp_path, content):
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    refused_in_words(load_config, path)


@fuzz
@given(st.dictionaries(st.sampled_from(NAMES), values, min_size=1, max_size=2))
def test_config_files_with_known_names(tmp_path, chosen):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(chosen, allow_unicode=True), encoding="utf-8")
    refused_in_words(load_config, path)


@fuzz
@given(
    st.sampled_from(["txt", "jsonl", "json", "csv", "tsv", "parquet"]),
    st.binary(max_size=200) | st.text(max_size=200).map(str.encode),
)
def test_prompt_files(tmp_path, suffix, content):
    path = tmp_path / f"prompts.{suffix}"
    path.write_bytes(content)
    refused_in_words(load_prompts, path)


@fuzz
@given(specs | st.text(max_size=12), st.integers(1, 12))
@example("segment:²", 4)
def test_chunker_specs(spec, steps):
    curve = torch.linspace(1, 0.1, steps)
    refused_in_words(lambda: make_chunker(spec)(curve))


@fuzz
@given(
    st.dictionaries(
        st.sampled_from(["experiment", "fixed", "arms", "grid", "seeds"]) | st.text(max_size=5),
        values,
        max_size=4,
    )
)
def test_sweep_files(tmp_path, content):
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump(content, allow_unicode=True), encoding="utf-8")
    refused_in_words(load_sweep, path)


PARAMETERS = ("seed", "lr", "name", "fast", "sizes", "rewards", "out_dir")
settings_of_a_trial = st.dictionaries(
    st.sampled_from(PARAMETERS) | st.text(max_size=5), values, max_size=2
)


@fuzz
@given(
    settings_of_a_trial,
    st.dictionaries(st.text(max_size=5), settings_of_a_trial | values, max_size=2),
    st.dictionaries(st.sampled_from(PARAMETERS), st.lists(values, max_size=2) | values, max_size=2),
)
def test_sweep_files_of_a_notebook(tmp_path, fixed, arms, grid):
    if not (tmp_path / "toy.ipynb").exists():
        write(tmp_path / "toy.ipynb", "seed")
    content = {"experiment": "toy.ipynb", "fixed": fixed, "arms": arms, "grid": grid}
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump(content, allow_unicode=True), encoding="utf-8")
    refused_in_words(load_sweep, path)


literals = st.text(alphabet="[]{}()'\"#:,.=|0123456789abcNone-+ \\\n", max_size=30)
annotations = st.sampled_from(
    ["int", "float", "str", "bool", "list[int]", "str | None", "dict", "Literal['a']", "Any", "x"]
)


@fuzz
@given(st.sampled_from(["a", "b.c", "a, b", "ß"]), annotations | literals, literals, values)
def test_parameter_cells(name, annotation, default, value):
    source = f"{name}: {annotation} = {default}  # help"
    try:
        found = parse_parameters(source)
    except ValueError as error:
        assert str(error).startswith("parameters: ")
        return
    for parameter in found.values():
        refused_in_words(check_value, parameter, value, "cell")


@fuzz
@given(st.text(alphabet="&*a[]{}:,-?|>!<% \n'\"0123~", max_size=60) | st.text(max_size=40))
def test_values_of_the_command_line(text):
    refused_in_words(parse_yaml, text)
    refused_in_words(parameter_values, [("name", text)])


@fuzz
@given(
    st.sampled_from(["jsonl", "json"]),
    st.lists(
        values | st.dictionaries(st.sampled_from(["prompt", "Text", "tag", "include"]), values),
        max_size=3,
    ),
)
def test_prompt_files_of_objects(tmp_path, suffix, records):
    path = tmp_path / f"prompts.{suffix}"
    lines = "\n".join(map(json.dumps, records))
    path.write_text(lines if suffix == "jsonl" else json.dumps(records), encoding="utf-8")
    refused_in_words(load_prompts, path)


@fuzz
@given(
    st.sampled_from(["choices", "message", "content", "text"]).flatmap(
        lambda key: st.dictionaries(st.just(key) | st.text(max_size=5), values)
    )
    | values
    | st.builds(lambda content: {"choices": [{"message": {"content": content}}]}, values)
    | st.builds(lambda message: {"choices": [{"message": message}]}, values)
)
def test_answers_of_a_judge(answer):
    assert refused_in_words(reply_text, answer) or isinstance(reply_text(answer), str)


@fuzz
@given(st.sampled_from(["index.json", "../manifest.json", "../config.yaml"]), values, st.data())
def test_damaged_run_folders(tmp_path, name, value, data):
    folder = tmp_path / "run"
    if not folder.exists():
        run = RunFolder.create(folder, make_config({}), {})
        save_checkpoint(run, 1, {"weights": torch.arange(4.0)})
        for path in (run.path / "checkpoints/index.json", run.path / "manifest.json"):
            path.with_suffix(".sound").write_bytes(path.read_bytes())
        (run.path / "config.sound").write_bytes((run.path / "config.yaml").read_bytes())
    run = RunFolder(folder)
    path = run.path / "checkpoints" / name
    sound = path.with_suffix(".sound").read_bytes()
    cut = data.draw(st.integers(0, len(sound)))
    path.write_bytes(sound[:cut] + json.dumps(value).encode() + sound[cut:])
    try:
        refused_in_words(lambda: check_resume(run, run.config, {"model": "x"}))
        refused_in_words(newest_checkpoint, run)
    finally:
        path.write_bytes(sound)


@fuzz
@given(st.text(max_size=80), st.text(alphabet=string.digits + ".-+ /", max_size=10))
def test_ratings(words, number):
    read_rating(f"{words} final score: {number}")


@fuzz
@given(st.text(max_size=30))
def test_weights_of_rewards(text):
    refused_in_words(parse_weights, text)


@fuzz
@given(st.text(max_size=40))
def test_captions(text):
    refused_in_words(parse_caption, text)


@fuzz
@given(data=st.data())
def test_damaged_checkpoints(tmp_path, data):
    folder = tmp_path / "run"
    known = folder.exists()
    run = RunFolder(folder) if known else RunFolder.create(folder, make_config({}), {})
    path = save_checkpoint(run, 1, {"weights": torch.arange(64.0), "done": 1})
    content = path.read_bytes()
    cut = data.draw(st.integers(0, len(content)))
    flipped = data.draw(st.integers(0, max(0, cut - 1)))
    damaged = bytearray(content[:cut])
    if damaged:
        damaged[flipped] ^= 0xFF
    path.write_bytes(bytes(damaged))
    refused_in_words(load_checkpoint, path)
