"""Settings: what is refused, and that files and dictionaries give the same thing."""

from dataclasses import asdict

import pytest

from chunk_grpo_nb.training.config import Config, load_config, make_config, save_config

REFUSED = [
    ({"group_size": 1}, "group_size = 1: must be at least 2"),
    ({"schema": 0}, "written for another version"),
    ({"sde": "ode"}, "must be one of flow, dance, cps"),
    ({"fraction": 0}, "above 0"),
    ({"fraction": 1.5}, "at most 1"),
    ({"chunker": "fixed:2,3"}, "sum to 5"),
    ({"chunker": "nonsense"}, "unknown chunker"),
    ({"chunker": "fixed:2,3,4,7", "selection": "only:4"}, r"outside 0\.\.3"),
    ({"step_weights": "std"}, "one per chunk"),
    ({"lora_alpha": 4}, "lora_rank"),
    ({"updates_per_iteration": 7}, "must divide the 192 images"),
    ({"rewards": {}}, "rewards are given as"),
    ({"ema_decay": 1.0}, r"in \[0, 1\)"),
    ({"chunk_rewards": [{"other": 1.0}] * 4, "chunker": "fixed:2,3,4,7"}, "not in rewards"),
    ({"chunk_rewards": [{"shapes_dense": 1.0}]}, "fixed number of chunks"),
]


@pytest.mark.parametrize("values, words", REFUSED)
def test_contradictions_are_refused(values, words):
    with pytest.raises(ValueError, match=words):
        Config(**values)


@pytest.mark.parametrize(
    "values",
    [
        {"learning_rate": "1e-5"},
        {"iterations": 2.5},
        {"same_noise": 1},
        {"seed": None},
        {"learning_rate": float("nan")},
    ],
)
def test_wrong_types_are_refused(values):
    with pytest.raises(TypeError, match=next(iter(values))):
        Config(**values)


def test_unknown_settings_name_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'group_size'"):
        make_config({"groupsize": 4})


def test_a_file_is_the_same_config_again(tmp_path):
    config = Config(seed=7, shift=None, chunker="step", step_weights="fixed:2,3,4,7")
    save_config(config, tmp_path / "c.yaml")
    assert load_config(tmp_path / "c.yaml") == config == make_config(asdict(config))


@pytest.mark.parametrize(
    "content, words",
    [
        (b"- a\n", "expected 'name: value'"),
        (b"\xff\xfe", "not readable"),
        (b"lerning_rate: 1.0\n", "did you mean 'learning_rate'"),
        (b"seed: [\n", "not readable"),
    ],
)
def test_bad_files_are_named(tmp_path, content, words):
    (tmp_path / "bad.yaml").write_bytes(content)
    with pytest.raises((TypeError, ValueError), match=words) as error:
        load_config(tmp_path / "bad.yaml")
    assert "bad.yaml" in str(error.value)
