"""Settings: what is refused, and that files and dictionaries give the same thing."""

import re
from dataclasses import fields

import pytest

from chunk_grpo_nb.training.config import (
    Config,
    flat,
    load_config,
    make_config,
    read_yaml,
    save_config,
    settings_table,
)

REFUSED = [
    ({"group_size": 1}, "group_size = 1: must be at least 2"),
    ({"num_steps": 10**18}, "must be at most"),
    ({"height": -16}, "height = -16: must be at least 1"),
    ({"shift": 0}, "shift = 0: must be above 0"),
    ({"clip_low": 5.0}, "clip_low = 5.0: must be at most 1"),
    ({"sde": "cps", "noise_level": 2.0}, "noise_level = 2.0: does not go with sde = cps"),
    ({"schema": 0}, "written for another version"),
    ({"sde": "ode"}, "must be one of flow, dance, cps"),
    ({"fraction": 0}, "above 0"),
    ({"fraction": 1.5}, "at most 1"),
    ({"chunker": "fixed:2,3"}, "sum to 5"),
    ({"chunker": "nonsense"}, "unknown chunker"),
    ({"chunker": "fixed:2,3,4,7", "selection": "only:4"}, r"outside 0\.\.3"),
    ({"chunker": "fixed:2,3,4,7", "selection": "only:²"}, r"outside 0\.\.3"),
    ({"selection": "only"}, "must be uniform"),
    ({"step_weights": "std"}, "write ratio: step:std"),
    ({"ratio": "chunk:adaptive"}, "must be chunk, chunk:std"),
    ({"ratio": "chunk:"}, "must be chunk, chunk:std"),
    ({"value_continuations": 2, "chunker": "adaptive"}, "begin at known steps"),
    (
        {"value_continuations": 2, "chunker": "fixed:8,8"}
        | {"chunk_rewards": [{"shapes_dense": 1.0}] * 2},
        "leave out chunk_rewards",
    ),
    ({"sde_window": 17}, "at most num_steps - 1 = 16"),
    ({"window_stride": 2}, "no meaning without sde_window"),
    ({"window_every": 25}, "no meaning without sde_window"),
    ({"window_range": [0, 5]}, "no meaning without sde_window"),
    ({"window_order": "random"}, "no meaning without sde_window"),
    ({"sde_window": 2, "chunker": "step", "window_range": [0, 1]}, "at least sde_window = 2"),
    ({"sde_window": 2, "chunker": "step", "window_range": [0, 17]}, "16 trained steps"),
    ({"sde_window": 2, "chunker": "step", "window_range": [0, 5, 6]}, r"must be \[first, end\]"),
    ({"sde_window": 2, "chunker": "step", "window_range": ["0", 5]}, r"must be \[first, end\]"),
    (
        {"sde_window": 2, "chunker": "step", "window_stride": 0, "window_every": 5},
        "window_every = 5: is ignored where the window stays",
    ),
    (
        {"sde_window": 2, "chunker": "step", "window_stride": 0, "window_order": "random"},
        "is ignored where the window stays",
    ),
    ({"trust_region": "dppo:1.0e-5", "clip_low": 1e-4}, "clip_low = 0.0001: is ignored by"),
    ({"trust_region": "dppo:1.0e-5", "clip_high": 1e-4}, "clip_high = 0.0001: is ignored by"),
    ({"selection": "weighted", "fraction": 1.0}, "is ignored with fraction = 1.0"),
    ({"selection": "anneal", "fraction": 1.0}, "is ignored with fraction = 1.0"),
    ({"sde_window": 4, "chunker": "fixed:2,3,4,7"}, "4 trained"),
    ({"sde_window": 4, "chunker": "online:adaptive"}, "averages curves of the same steps"),
    ({"trust_region": "clip:"}, "must be clip, clip:length"),
    ({"trust_region": "dppo"}, "a positive number"),
    ({"trust_region": "dppo:-1"}, "a positive number"),
    ({"trust_region": "dppo:near"}, "a positive number"),
    ({"ratio": "step:"}, "must be chunk, chunk:std"),
    ({"ratio": "step:nonsense"}, "unknown chunker"),
    ({"ratio": "step:fixed:2,3"}, "ratio"),
    ({"lora_alpha": 4}, "lora_rank"),
    ({"updates_per_iteration": 7}, "must divide the 192 images"),
    ({"rewards": {}}, "is given as"),
    ({"rewards": {"a": "1"}}, "a weight is a number"),
    ({"rewards": {"a": {"model": "x"}}}, "a weight is a number"),
    ({"ema_decay": 1.0}, "below 1"),
    ({"chunk_rewards": [{"other": 1.0}] * 4, "chunker": "fixed:2,3,4,7"}, "not in rewards"),
    ({"chunk_rewards": [{"shapes_dense": 1.0}]}, "fixed number of chunks"),
    ({"chunk_rewards": [{"shapes_dense": 1.0}], "chunker": "fixed:8,8"}, "has 1 entries"),
    ({"seed": 1, "run": {"seed": 2}}, "given twice"),
    ({"run": 3}, "a group of settings"),
]


@pytest.mark.parametrize("values, words", REFUSED)
def test_contradictions_are_refused(values, words):
    with pytest.raises(ValueError, match=words):
        make_config(values)


@pytest.mark.parametrize(
    "values",
    [
        {"learning_rate": "1e-5"},
        {"iterations": 2.5},
        {"same_noise": 1},
        {"seed": None},
        {"learning_rate": float("nan")},
        {"learning_rate": 10**400},
    ],
)
def test_wrong_types_are_refused(values):
    with pytest.raises(TypeError, match=next(iter(values))):
        make_config(values)


def test_unknown_settings_name_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'group_size'"):
        make_config({"groupsize": 4})
    with pytest.raises(ValueError, match="did you mean 'clip_low'"):
        make_config({"objective": {"cliplow": 4}})
    with pytest.raises(TypeError, match="name: value pairs"):
        make_config([("seed", 1)])


def test_a_setting_without_its_group_is_an_error_that_names_the_group():
    with pytest.raises(AttributeError, match=r"config\.objective\.clip_low"):
        _ = Config().clip_low
    with pytest.raises(TypeError, match="seed"):
        Config(seed=1)


def test_names_are_unique_and_no_group_is_called_like_a_setting():
    names = [f.name for g in fields(Config) for f in fields(getattr(Config(), g.name))]
    assert len(names) == len(set(names)) == len(settings_table())
    assert not {g.name for g in fields(Config)} & set(names)


def test_flat_grouped_and_keywords_are_the_same():
    by_name = make_config({"clip_low": 0.1, "seed": 3})
    assert by_name == make_config({"objective": {"clip_low": 0.1}, "run": {"seed": 3}})
    assert by_name == make_config(clip_low=0.1, seed=3) == make_config(flat(by_name))
    assert make_config(base=by_name, seed=0) == make_config(clip_low=0.1)


def test_a_default_is_no_wish():
    """A saved file lists every setting; those that nobody asked for must not stand in the way."""
    config = make_config(trust_region="dppo:1.0e-5", clip_low=1e-3, window_every=1)
    assert make_config(flat(config)) == config


def test_places_of_a_window_in_a_range_are_all_drawn():
    sampling = make_config(
        {"num_steps": 10, "sde_window": 2, "window_range": [1, 5], "window_order": "random"},
        chunker="step",
    ).sampling
    assert sampling.window_places == [1, 2, 3] and sampling.window_moves
    drawn = [sampling.window_start(i, seed=3) for i in range(600)]
    assert [drawn.count(place) / 600 for place in (1, 2, 3)] == pytest.approx([1 / 3] * 3, abs=0.06)
    still = make_config({"num_steps": 10, "sde_window": 2, "window_range": [3, 5]}, chunker="step")
    assert still.sampling.window_places == [3] and not still.sampling.window_moves


def test_rewards_may_have_options():
    rewards = {"plain": 0.5, "ocr": {"weight": 2, "case": True}}
    objective = make_config(rewards=rewards).objective
    assert objective.reward_weights == {"plain": 0.5, "ocr": 2}
    assert objective.reward_options == {"plain": {}, "ocr": {"case": True}}


def test_defaults_are_not_shared():
    assert Config().objective.rewards is not Config().objective.rewards


def test_a_file_is_the_same_config_again(tmp_path):
    config = make_config(seed=7, shift=None, chunker="step", ratio="step:fixed:2,3,4,7")
    save_config(config, tmp_path / "c.yaml")
    assert load_config(tmp_path / "c.yaml") == config == make_config(flat(config))


def test_files_of_the_first_version_are_read(tmp_path):
    (tmp_path / "old.yaml").write_text("schema: 1\nratio: chunk\nstep_weights: null\nseed: 4\n")
    assert load_config(tmp_path / "old.yaml") == make_config(seed=4)


def test_an_unquoted_no_is_a_precision(tmp_path):
    (tmp_path / "c.yaml").write_text("mixed_precision: no\n")
    assert load_config(tmp_path / "c.yaml").policy.mixed_precision == "no"
    with pytest.raises(TypeError, match="mixed_precision"):
        make_config(mixed_precision=True)


BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 60))


@pytest.mark.parametrize(
    "content, words",
    [
        (b"- a\n", "expected 'name: value'"),
        (b"\xff\xfe", "not readable"),
        (b"lerning_rate: 1.0\n", "did you mean 'learning_rate'"),
        (b"seed: [\n", "not readable"),
        (b"seed: 1\nseed: 2\n", "given twice"),
        (b"run: {seed: 1}\nseed: 2\n", "given twice"),
        (BOMB.encode(), "references are not supported"),
        (b"seed: " + b"[" * 5000 + b"]" * 5000, "nested deeper"),
        (b"seed: " + b"{a: " * 5000 + b"}" * 5000, "nested deeper"),
        (b"seed: 2024-01-01\n", "is a date"),
        (b"seed: !!set {1}\n", "seed"),
        (b"? [1, 2]\n: 3\n", "unknown setting|not readable"),
        (b"seed: !!python/object/apply:os.system [true]\n", "not readable"),
        (b"model: \x07bell\n", "not readable"),
        (b"x" * 2_000_000, "2000000 bytes"),
        (b"num_steps: 1000000000000000000\n", "at most"),
        (b"num_steps: 1:30\n", "num_steps = '1:30' is a str"),
        (b"seed: 017\n", "seed = '017' is a str"),
        (b"clip_high: 1:30.5\n", "clip_high = '1:30.5' is a str"),
    ],
)
def test_bad_files_are_named(tmp_path, content, words):
    (tmp_path / "bad.yaml").write_bytes(content)
    with pytest.raises((TypeError, ValueError), match=words) as error:
        load_config(tmp_path / "bad.yaml")
    assert "bad.yaml" in str(error.value)
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f]", str(error.value))


def test_home_is_understood(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "c.yaml").write_text("seed: 4\n")
    assert read_yaml("~/c.yaml") == {"seed": 4}
    config = make_config(model="~/flux", train_prompts="~/p.txt")
    assert config.policy.model == f"{tmp_path}/flux"
    assert config.data.train_prompts == f"{tmp_path}/p.txt"


def test_a_distance_that_is_registered_is_a_setting():
    from chunk_grpo_nb.dynamics import METRICS, register_metric

    with pytest.raises(ValueError, match="metric = 'largest': must be one of l1, l2, cosine"):
        make_config(metric="largest")
    register_metric("largest")(lambda a, b: (b - a).abs().amax(-1))
    try:
        assert make_config(metric="largest").objective.metric == "largest"
    finally:
        del METRICS["largest"]
