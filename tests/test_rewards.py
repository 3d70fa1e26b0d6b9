"""The registry, the one checked scoring call, pairing of images and prompts, weighted sums."""

import math
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from PIL import Image

from chunk_grpo_nb.rewards import registry as rewards
from chunk_grpo_nb.rewards.combined import (
    PairwiseReward,
    WeightedReward,
    parse_weights,
    win_rate,
)
from chunk_grpo_nb.rewards.registry import (
    RewardError,
    RewardUnavailable,
    make_reward,
    make_rewards,
    register_reward,
    reward_function,
)
from chunk_grpo_nb.rewards.scoring import check_pairing, score, score_async

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
    with pytest.raises(ValueError, match="does not take gian; its options are gain"):
        make_reward("loaded", gian=2)
    with pytest.raises(ValueError, match="letters, digits"):
        register_reward("a=b")


def test_unknown_names_are_refused_with_the_nearest():
    with pytest.raises(ValueError, match="unknown reward 'pickscor'; did you mean 'pickscore'"):
        make_reward("pickscor")


def test_names_in_modules_not_yet_imported():
    import subprocess
    import sys

    code = (
        "import sys; from chunk_grpo_nb.rewards.registry import make_reward; "
        "assert 'chunk_grpo_nb.rewards.compression' not in sys.modules; "
        "print(make_reward('jpeg_compressibility').__name__)"
    )
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


# ---------------------------------------------------------------- pairing


def test_pairing_of_a_sound_reward():
    assert check_pairing(value, IMAGES, PROMPTS).tolist() == value(IMAGES, PROMPTS, [{}] * 5)


@pytest.mark.parametrize("wrong", [
    lambda i, p, m: sorted(value(i, p, m)),
    lambda i, p, m: value(i, sorted(p), m),
    lambda i, p, m: [v - sum(value(i, p, m)) / len(i) for v in value(i, p, m)],
    lambda i, p, m: [k for k, _ in enumerate(i)],
], ids=["sorted scores", "sorted prompts", "centred", "position"])  # fmt: skip
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


# ---------------------------------------------------------------- names and options


@pytest.mark.parametrize(
    "name",
    [
        None,
        ["jpeg_compressibility"],
        3,
        "",
        " ",
        "x" * 300,
        "²",
        "a\x1b[2Jb",
        "ftp://h/x",
        "http://[",
    ],
)
def test_names_that_are_none_are_refused_in_one_plain_line(name):
    with pytest.raises(ValueError) as error:
        make_reward(name)
    message = str(error.value)
    assert "\n" not in message and "\x1b" not in message and len(message) < 700


@pytest.mark.parametrize("name", ["no\x1bsuch=1", "a=" + "9" * 10_000, "=", "a=1,,b=2"])
def test_weighted_lists_that_are_none(name):
    with pytest.raises(ValueError) as error:
        make_reward(name)
    assert "\x1b" not in str(error.value) and len(str(error.value)) < 700


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("hpsv3", {"devise": "cpu"}, "does not take devise; its options are .*device, offload"),
        ("clip_score", {"device": "gpu0"}, "device 'gpu0': expected cpu, cuda, or a card"),
        ("clip_score", {"device": 0.5}, "device '0.5': expected"),
        ("hpsv3", {"dtype": "float17"}, "dtype 'float17': expected float32"),
        ("hpsv3", {"dtype": "int8"}, "dtype 'int8'"),
        ("vlm_judge", {"url": "http://h:1"}, "'vlm_judge' needs model"),
        ("jpeg_compressibility", {"device": "cpu"}, "its options are quality"),
        ("http://h:1/x", {"batch": 3}, "does not take batch"),
        ("http://h:1/x", {"timeout": 0}, "must be positive"),
    ],
)
def test_options_are_refused_before_anything_is_loaded(name, options, message):
    with pytest.raises(ValueError, match=message):
        make_reward(name, **options)


def test_a_bad_option_of_one_reward_stops_before_another_is_loaded():
    loaded = []
    register_reward("heavy")(lambda: loaded.append("heavy"))
    with pytest.raises(ValueError, match="does not take gian"):
        make_rewards({"heavy": {}, "jpeg_compressibility": {"gian": 1}})
    assert loaded == []


def test_the_runs_device_goes_to_rewards_that_take_one_and_name_none():
    register_reward("on_a_card")(lambda device=None: lambda *a: device)
    register_reward("elsewhere")(lambda: lambda *a: None)
    rewards_made = make_rewards({"on_a_card": {}, "elsewhere": {}}, device="cpu")
    assert rewards_made["on_a_card"]() == "cpu"
    assert (
        make_rewards({"on_a_card": {"device": "cuda:1"}}, device="cpu")["on_a_card"]() == "cuda:1"
    )


def test_path_stands_for_model():
    register_reward("by_file")(lambda model="hub/id": lambda *a: model)
    assert make_reward("by_file", path="x.pt")() == "x.pt"
    assert make_reward("by_file")() == "hub/id"
    with pytest.raises(ValueError, match="does not take path"):
        make_reward("by_file", path="x", model="y")


def test_each_process_scores_on_its_own_card(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert rewards.pick_device(None) == torch.device("cuda:0")
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert rewards.pick_device("cuda") == rewards.pick_device(None) == torch.device("cuda:3")
    assert rewards.pick_device("cuda:1") == torch.device("cuda:1")
    assert rewards.pick_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # the launcher shows one card only
    assert rewards.pick_device("cuda") == torch.device("cuda:0")


def test_rewards_of_a_user_that_cannot_be_imported(tmp_path, monkeypatch):
    (tmp_path / "broken_rewards.py").write_text("value = 3\nraise KeyError('no key')\n")
    (tmp_path / "number_rewards.py").write_text("value = 3\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ValueError, match="KeyError: .*no key.*expected module:function"):
        make_reward("broken_rewards:value")
    with pytest.raises(ValueError, match="is a int; name a function"):
        make_reward("number_rewards:value")


def test_rewards_run_without_gradients_in_any_thread():
    weight = torch.ones(1, requires_grad=True)
    modes = []

    def reward(images, prompts, metadata):
        modes.append((weight * 2).requires_grad)
        return [1.0] * len(images)

    with ThreadPoolExecutor(1) as pool:
        pool.submit(score, reward, IMAGES, PROMPTS).result()
    assert modes == [False]


def test_messages_are_short_and_plain():
    def reward(images, prompts, metadata):
        raise RuntimeError("\x1b[31m" + "x" * 1_000_000 + "\nsecond line")

    with pytest.raises(RewardError) as error:
        score(reward, IMAGES[:1], ["\x1b[2J" + "p" * 1_000_000])
    message = str(error.value)
    assert len(message) < 1000 and "\x1b" not in message and "\n" not in message


def test_more_prompts_than_any_cache_holds():
    prompts = [f"prompt {i}" for i in range(5000)]
    assert score(value, [IMAGES[1]] * 5000, prompts).tolist() == [1 + 10 * i for i in range(5000)]


# ---------------------------------------------------------------- whole groups


def group_ranks(calls):
    @reward_function("ranks", whole_group=True)
    def ranks(images, prompts, metadata):
        calls.append(prompts)
        if "bad" in prompts:
            raise ValueError("no rank")
        shades = [image.getpixel((0, 0))[0] for image in images]
        return [sorted(shades).index(shade) for shade in shades]

    return ranks


def test_a_group_reward_is_called_once_per_group():
    calls = []
    order = [4, 0, 3, 1, 2]
    prompts = ["a", "b", "a", "b", "a"]
    scores = score(group_ranks(calls), [IMAGES[i] for i in order], prompts)
    assert scores.tolist() == [2, 0, 1, 1, 0] and calls == [["a"] * 3, ["b"] * 2]


def test_groups_of_the_same_prompt_are_told_apart_by_ids():
    calls = []
    ids = torch.tensor([0, 0, 1, 1, 1])
    scores = score(group_ranks(calls), IMAGES, ["a"] * 5, group_ids=ids)
    assert scores.tolist() == [0, 1, 0, 1, 2]


def test_a_failing_group_is_dropped_whole():
    scores = score(group_ranks([]), IMAGES, ["a", "a", "bad", "bad", "bad"], on_failure="drop")
    assert scores.isnan().tolist() == [False, False, True, True, True]
    with pytest.raises(RewardError, match="no rank"):
        score(group_ranks([]), IMAGES, ["bad"] * 5)


def test_pairing_of_a_group_reward_is_checked_by_permuting():
    assert check_pairing(group_ranks([]), IMAGES, ["a"] * 5).tolist() == [0, 1, 2, 3, 4]


def test_win_rates_by_hand():
    beats = torch.tensor([[0.0, 1, 0.5], [0, 0, 1], [0.5, 0, 0]])
    assert win_rate(beats).tolist() == [0.75, 0.5, 0.25]
    assert win_rate(beats + 9 * torch.eye(3)).tolist() == [0.75, 0.5, 0.25]  # diagonal unread
    for wrong in (torch.zeros(1, 1), torch.zeros(2, 3), torch.zeros(3)):
        with pytest.raises(ValueError, match="expected .G, G."):
            win_rate(wrong)


def test_win_rate_of_a_pointwise_reward_within_each_prompt():
    reward_function("value")(value)
    reward = make_reward("win_rate", reward="value")
    scores = score(reward, IMAGES, ["prompt 1", "prompt 2", "prompt 1", "prompt 2", "prompt 1"])
    assert scores.tolist() == [0.0, 0.0, 0.5, 1.0, 1.0]
    draw = make_reward("win_rate", reward="value", margin=10)
    assert score(draw, IMAGES, ["prompt 1"] * 5).tolist() == [0.5] * 5
    with pytest.raises(RewardError, match="needs a group to compare with"):
        score(reward, IMAGES[:1], PROMPTS[:1])
    with pytest.raises(ValueError, match="unknown reward 'valeu'; did you mean 'value'"):
        make_reward("win_rate", reward="valeu")


def test_pairwise_judges_are_asked_in_both_orders_and_places_cancel():
    asked = []

    def always_the_first(first, second, prompts, metadata):
        asked.extend(zip(first, second, prompts))
        return [1.0] * len(first)

    scores = score(PairwiseReward(always_the_first), IMAGES[:3], ["a"] * 3)
    assert scores.tolist() == [0.5] * 3 and len(asked) == 6
    one_order = PairwiseReward(always_the_first, both_orders=False)
    assert score(one_order, IMAGES[:3], ["a"] * 3).tolist() == [1.0, 0.5, 0.0]


def test_a_sum_with_a_group_reward_sees_whole_groups():
    group_ranks([])
    reward_function("value")(value)
    both = make_reward("ranks=10,value=1")
    prompts = ["prompt 0", "prompt 0", "prompt 0", "prompt 0", "prompt 0"]
    assert score(both, IMAGES, prompts).tolist() == [0, 11, 22, 33, 44]
