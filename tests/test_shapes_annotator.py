"""The annotator's taste: what moves it, what must not, and that nonsense cannot please it."""

import numpy as np
import pytest
import torch
from PIL import Image

from chunk_grpo_nb.rewards.registry import make_reward
from chunk_grpo_nb.rewards.scoring import check_pairing
from chunk_grpo_nb.shapes.annotator import (
    BASE,
    LIMIT,
    crispness,
    hue_closeness,
    utility,
    utility_parts,
)
from chunk_grpo_nb.shapes.preference import (
    annotate,
    choice_accuracy,
    jitter,
    mirrors,
    pair_indices,
    within_correlation,
)
from chunk_grpo_nb.shapes.scenes import COLOURS, Item, Scene, conditions, parse_caption, render
from chunk_grpo_nb.shapes.verifier import ink_depth

REWARDS = ("utility", "early", "late", "hue", "size", "vivid", "crisp")


def asked(text: str) -> list[dict]:
    """The conditions of a caption."""
    return conditions(parse_caption(text))


def circle(colour: str, radius: float = 6.0, x: float = 16.0) -> Scene:
    """One circle."""
    return Scene((Item("circle", colour, x, 16.0, radius),))


def test_only_the_favourite_is_close_to_itself():
    closeness = hue_closeness(render([circle(colour) for colour in COLOURS]))[:, 16, 16]
    assert closeness[list(COLOURS).index("blue")] > 0.95
    assert (closeness > 0.05).sum() == 1


def test_a_named_colour_is_no_matter_of_taste():
    pictures = render([circle("red"), circle("blue")])
    named = utility_parts(pictures, [asked("a red circle")] * 2)
    assert named["hue"].tolist() == [0, 0]
    assert utility(pictures, [asked("a red circle")] * 2)["hue"].tolist() == [0, 0]
    free = utility(pictures, [asked("a circle")] * 2)
    assert free["hue"][1] > free["hue"][0] + 2


def test_a_place_is_no_matter_of_taste():
    pictures = render([circle("blue", x=x) for x in (9.0, 16.0, 23.0)])
    worth = utility(pictures, [asked("a circle")] * 3)["utility"]
    assert np.ptp(worth) < 0.05


def test_a_shape_too_many_adds_no_size():
    pair = Scene((Item("circle", "blue", 8, 16, 5), Item("circle", "blue", 24, 16, 5)))
    sizes = utility_parts(render([circle("blue", 5), pair]), [asked("a circle")] * 2)["size"]
    assert abs(sizes[0] - sizes[1]) < 0.1
    missing = utility_parts(render([circle("blue", 5)]), [asked("two circles")])["size"]
    assert abs(missing[0] - 2.5) < 0.1


def test_deeper_ink_is_more_vivid_and_keeps_its_hue():
    pale = render([circle("blue")])
    ground = pale[0, 0, 0].astype(float)
    deep = (ground + (pale - ground) * 1.1).clip(0, 255).astype(np.uint8)
    values = utility_parts(np.concatenate([pale, deep]), [asked("a circle")] * 2)
    assert values["vivid"][1] > values["vivid"][0] + 0.05
    assert abs(values["hue"][1] - values["hue"][0]) < 0.05


def test_a_blank_picture_has_no_outline():
    depth = ink_depth(render([Scene(()), circle("blue")]))
    assert crispness(depth)[0] == 0 and crispness(depth)[1] > 0.5


def test_nonsense_cannot_please():
    rng = np.random.default_rng(1)
    nonsense = rng.integers(0, 256, (60, 32, 32, 3), dtype=np.uint8)
    nonsense[:20] = rng.integers(0, 256, (20, 1, 1, 3))
    nonsense[20:40] = np.where(rng.random((20, 32, 32, 1)) < 0.5, 255, nonsense[20:40] // 4)
    for text in ("a circle", "two crosses", "a red circle and a blue square"):
        worth = utility(nonsense, [asked(text)] * 60)
        assert all(np.isfinite(part).all() for part in worth.values())
        assert worth["utility"].max() < 0


def test_scaled_parts_are_bounded_and_add_up():
    pictures = render([circle("blue", 9), circle("yellow", 3), Scene(())])
    worth = utility(pictures, [asked("a circle")] * 3)
    assert all(np.abs(worth[name]).max() <= LIMIT for name in BASE)
    assert np.allclose(sum(worth[name] for name in BASE), worth["utility"])
    assert np.allclose(worth["early"] + worth["late"] + worth["follow"], worth["utility"])


def test_another_number_of_conditions_is_refused():
    with pytest.raises(ValueError, match="2 pictures but 1 lists"):
        utility(render([circle("blue")] * 2), [asked("a circle")])


@pytest.mark.parametrize("name", REWARDS)
def test_rewards_go_with_their_pictures(name):
    scenes = [circle("blue", 8), circle("red", 5), circle("black", 4), circle("green", 7)]
    images = [Image.fromarray(picture) for picture in render(scenes)]
    prompts = ["a circle", "a circle", "a black circle", "two circles"]
    check_pairing(make_reward(f"shapes_{name}"), images, prompts)


def test_choices_are_as_noisy_as_they_should_be():
    values = np.random.default_rng(0).normal(0, 2, (4000, 3))
    pictures = np.zeros((4000, 3, 1), np.uint8)
    choices = annotate(["a circle"] * 4000, pictures, values, temperature=2.0)
    first, second = pair_indices(3)
    chance = 1 / (1 + np.exp(-(values[:, first] - values[:, second]) / 2))
    assert abs((choices.preferred - chance).mean()) < 0.01
    assert (
        abs(choice_accuracy(values, choices.preferred) - np.maximum(chance, 1 - chance).mean())
        < 0.01
    )


def test_correlation_ignores_what_groups_have_in_common():
    rng = np.random.default_rng(0)
    values = rng.normal(0, 1, (50, 4))
    assert within_correlation(values, values + rng.normal(0, 9, (50, 1))) > 0.999


def test_mirroring_respects_the_caption():
    texts = ["a circle left of a cross", "a circle above a cross", "a triangle", "two crosses"]
    assert mirrors(texts).tolist() == [[False, True], [True, False], [True, False], [True, True]]
    pictures = torch.arange(2 * 3 * 32 * 32.0).view(1, 2, 3, 32, 32)
    still = jitter(pictures, torch.zeros(1, 2, dtype=torch.bool), np.random.default_rng(0), reach=0)
    assert torch.equal(still, pictures)
