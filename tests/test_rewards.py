"""The registry, the one checked scoring call, pairing of images and prompts, weighted sums."""

import math
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from PIL import Image

from chunk_grpo_nb.rewards import registry as rewards
from chunk_grpo_nb.rewards.registry import (
    RewardError,
    RewardUnavailable,
    WeightedReward,
    check_pairing,
    make_reward,
    parse_weights,
    register_reward,
    reward_function,
    score,
    score_async,
)

IMAGES = [Image.new("RGB", (4, 4), (i, 0, 0)) for i in range(5)]
PROMPTS = [f"prompt {i}" for i in range(5)]


@pytest.fixture(autouse=True)
def registry():
    before = dict(rewards.REWARDS)
    yield
    for name in set(rewards.REWARDS) - set(before) - set(rewards.REWARD_MODULES):
        del rewards.REWARDS[name]


def value(images, prompts, metadata):
    """Depends on image, prompt and metadata of one entry only."""
    return [
        image.getpixel((0, 0))[0] + 10 * int(p.split()[-1]) + m.get("bonus", 0)
        for image, p, m in zip(images, prompts, metadata)
    ]


def test_scores_are_float64_in_order():
    out = score(value, IMAGES, PROMPTS, [{"bonus": 100 * i} for i in range(5)])
    assert out.dtype == torch.float64 and out.tolist() == [0, 111, 222, 333, 444]
    for returned in (
        torch.arange(5.0, requires_grad=True),
        range(5),
        [torch.tensor(float(i)) for i in range(5)],
        torch.arange(5).half(),
    ):
        assert score(lambda *a, returned=returned: returned, IMAGES, PROMPTS).tolist() == [
            0,
            1,
            2,
            3,
            4,
        ]


def test_custom_rewards_and_options():
    @reward_function("mine")
    def mine(images, prompts, metadata, *, gain=1.0):
        return [gain] * len(images)

    @register_reward("loaded")
    def loaded(gain=1.0):
        return lambda images, prompts, metadata: [gain] * len(images)

    assert make_reward("mine") is mine and make_reward(mine) is mine
    for name in ("mine", "loaded", mine):
        assert score(make_reward(name, gain=3.0), IMAGES, PROMPTS).tolist() == [3.0] * 5
    with pytest.raises(ValueError, match="does not take these options.*'gian'"):
        make_reward("loaded", gian=2)
    with pytest.raises(ValueError, match="letters, digits"):
        register_reward("a=b")


def test_unknown_names_are_refused_with_the_nearest():
    with pytest.raises(ValueError, match="unknown reward 'pickscor'; did you mean 'pickscore'"):
        make_reward("pickscor")


def test_names_in_modules_not_yet_imported():
    import subprocess
    import sys

    code = "import sys; from chunk_grpo_nb.rewards.registry import make_reward; assert 'chunk_grpo_nb.rewards.clip_family' not in sys.modules; print(make_reward('jpeg_compressibility').__name__)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert out.stdout.strip() == "jpeg_compressibility", out.stderr


@pytest.mark.parametrize("name, module", sorted(rewards.REWARD_MODULES.items()))
def test_every_name_of_the_table_is_registered_by_its_module(name, module):
    import importlib.util

    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not there yet")
    rewards._factory(name)
    assert name in rewards.REWARDS


def test_rewards_of_a_users_module(tmp_path, monkeypatch):
    (tmp_path / "my_rewards_for_test.py").write_text(
        "def one(images, prompts, metadata, x=1):\n    return [x] * len(images)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert score(make_reward("my_rewards_for_test:one", x=2), IMAGES, PROMPTS).tolist() == [2] * 5
    for wrong in ("my_rewards_for_test:two", "no_such_module_here:one"):
        with pytest.raises(ValueError, match="expected module:function"):
            make_reward(wrong)


# ---------------------------------------------------------------- failures


def failing_on(bad, how):
    def reward(images, prompts, metadata):
        if how == "raise" and set(prompts) & set(bad):
            raise KeyError("colour")
        if how == "length" and set(prompts) & set(bad):
            return [1.0] * (len(images) + 1)
        return [
            {"nan": math.nan, "inf": math.inf, "text": "high"}[how]
            if p in bad and how in ("nan", "inf", "text")
            else 1.0
            for p in prompts
        ]

    return reward


@pytest.mark.parametrize(
    "how, message",
    [
        ("raise", "KeyError: 'colour'"),
        ("length", "returned 6 scores for 5 images"),
        ("nan", "returned .nan."),
        ("inf", "returned .inf."),
        ("text", "ValueError"),
    ],
)
def test_failures_name_the_prompts_or_drop_them(how, message):
    reward = failing_on(["prompt 2"], how)
    with pytest.raises(RewardError, match=message) as error:
        score(reward, IMAGES, PROMPTS)
    assert "prompt 2" in str(error.value) and "'reward'" in str(error.value)
    if how in ("nan", "inf"):
        assert "prompt 1" not in str(error.value)
    out = score(reward, IMAGES, PROMPTS, on_failure="drop")
    assert out.isnan().tolist() == [False, False, True, False, False] and out.nansum() == 4


def test_nothing_at_all_is_a_wrong_length():
    with pytest.raises(RewardError, match="TypeError"):
        score(lambda *a: None, IMAGES, PROMPTS)
    with pytest.raises(RewardError, match="returned 0 scores for 5 images"):
        score(lambda *a: [], IMAGES, PROMPTS)


def test_many_prompts_are_not_all_spelt_out():
    with pytest.raises(RewardError, match="and 16 more") as error:
        score(failing_on(["p7"], "raise"), [IMAGES[0]] * 20, [f"p{i}" for i in range(20)])
    assert len(str(error.value)) < 300


def test_an_unreachable_scorer_stops_the_run_in_both_modes():
    calls = []

    def down(images, prompts, metadata):
        calls.append(len(images))
        raise RewardUnavailable("no server")

    for mode in ("raise", "drop"):
        with pytest.raises(RewardUnavailable):
            score(down, IMAGES, PROMPTS, on_failure=mode)
    assert calls == [5, 5]  # never asked again image by image


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="5 images, 4 prompts"):
        score(value, IMAGES, PROMPTS[:4])
    with pytest.raises(ValueError, match="on_failure is 'ignore'"):
        score(value, IMAGES, PROMPTS, on_failure="ignore")
    assert score(value, [], []).shape == (0,)


# ---------------------------------------------------------------- pairing (trap 9)


def test_pairing_of_a_sound_reward():
    assert check_pairing(value, IMAGES, PROMPTS).tolist() == value(IMAGES, PROMPTS, [{}] * 5)


@pytest.mark.parametrize("wrong", [
    lambda i, p, m: sorted(value(i, p, m)),
    lambda i, p, m: value(i, sorted(p), m),
    lambda i, p, m: [v - sum(value(i, p, m)) / len(i) for v in value(i, p, m)],
    lambda i, p, m: [k for k, _ in enumerate(i)],
], ids=["sorted scores", "sorted prompts", "centred on the batch", "position in the batch"])  # fmt: skip
def test_pairing_finds_rewards_that_mix_entries(wrong):
    with pytest.raises(RewardError, match="mixes up its inputs"):
        check_pairing(wrong, IMAGES, PROMPTS)


# ---------------------------------------------------------------- several rewards


def test_weights_are_parsed_and_refused():
    assert parse_weights("a=1, http://h:1/x=0.5,b=-2e-1") == {
        "a": 1.0,
        "http://h:1/x": 0.5,
        "b": -0.2,
    }
    for text, message in {
        "a": "expected name=weight",
        "a=x": "expected name=weight",
        "=1": "expected",
        "a=nan": "expected",
        "a=1,a=2": "appears twice",
        "a=1,": "expected",
    }.items():
        with pytest.raises(ValueError, match=message):
            parse_weights(text)


def test_weighted_sum_and_parts():
    reward_function("ones")(lambda images, prompts, metadata, x=1.0: [x] * len(images))
    reward_function("value")(value)
    both = make_reward("value=0.5,ones=2", options={"ones": {"x": 3.0}})
    parts = both.parts(IMAGES, PROMPTS, [{}] * 5)
    assert list(parts) == ["value", "ones"] and parts["ones"].tolist() == [3.0] * 5
    torch.testing.assert_close(score(both, IMAGES, PROMPTS), 0.5 * parts["value"] + 6.0)
    with pytest.raises(ValueError, match="not among the rewards"):
        WeightedReward({"ones": 1.0}, {"one": {}})


def test_a_failing_part_fails_the_sum():
    reward_function("bad")(failing_on(["prompt 2"], "nan"))
    with pytest.raises(RewardError, match="'bad' returned"):
        score(WeightedReward({"bad": 1.0}), IMAGES, PROMPTS)
    dropped = score(WeightedReward({"bad": 1.0}), IMAGES, PROMPTS, on_failure="drop")
    assert dropped.isnan().sum() == 1


# ---------------------------------------------------------------- while sampling


def test_async_scores_equal_and_errors_arrive_with_the_result():
    assert (
        score_async(value, IMAGES, PROMPTS).result().tolist()
        == score(value, IMAGES, PROMPTS).tolist()
    )
    future = score_async(failing_on(["prompt 1"], "nan"), IMAGES, PROMPTS)
    with pytest.raises(RewardError, match="prompt 1"):
        future.result()


def test_rewards_with_an_executor_do_not_block():
    gate = threading.Event()

    class Remote:
        name, executor = "remote", ThreadPoolExecutor(1)

        def __call__(self, images, prompts, metadata):
            gate.wait(5)
            return value(images, prompts, metadata)

    future = score_async(Remote(), IMAGES, PROMPTS)
    assert not future.done()
    gate.set()
    assert future.result(timeout=5).tolist() == value(IMAGES, PROMPTS, [{}] * 5)
