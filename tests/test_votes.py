"""Votes: ballots that survive, fits that recover a taste, a widget whose messages vote."""

import json

import pytest
import torch
from PIL import Image

from chunk_grpo_nb.rewards.ballot import Ballot, Pair, ballot_widget, make_pairs, read_image_folder
from chunk_grpo_nb.rewards.registry import RewardUnavailable, make_reward
from chunk_grpo_nb.rewards.scoring import score
from chunk_grpo_nb.rewards.votes import (
    bradley_terry,
    fit_taste,
    load_taste,
    save_taste,
    taste_agreement,
)


def picture(value: int) -> Image.Image:
    return Image.new("RGB", (8, 8), (value, 0, 255 - value))


def redness(images) -> torch.Tensor:
    """Features of a picture: red, blue, and a constant that says nothing."""
    pixels = torch.tensor([image.getpixel((0, 0)) for image in images], dtype=torch.float64)
    return torch.stack([pixels[:, 0], pixels[:, 2], torch.ones(len(pixels))], dim=1)


@pytest.fixture
def pairs() -> list[Pair]:
    prompts = [f"prompt {i % 3}" for i in range(18)]
    return make_pairs(prompts, [picture(10 * i) for i in range(18)], count=40, seed=1)


def test_pairs_share_a_prompt_and_never_repeat(pairs):
    assert len({frozenset((p.left.tobytes(), p.right.tobytes())) for p in pairs}) == 40
    assert all(p.left.tobytes() != p.right.tobytes() for p in pairs)
    with pytest.raises(ValueError, match="46 pairs were asked for.*give only 45"):
        make_pairs([f"{i % 3}" for i in range(18)], [picture(i) for i in range(18)], count=46)


def test_votes_survive_and_belong_to_their_pictures(pairs, tmp_path):
    ballot = Ballot(pairs, tmp_path / "deep" / "votes.jsonl")
    for choice in ("left", "right", "skip", "left"):
        ballot.vote(choice)
    ballot.undo()
    again = Ballot(pairs, ballot.path)
    assert again.position == 3
    assert torch.equal(again.choices[:2], torch.tensor([1.0, 0.0], dtype=torch.float64))
    assert again.choices[2:].isnan().all()
    other = Ballot(pairs[::-1], ballot.path)  # the same pairs in another order
    assert other.choices[-1] == 1 and other.choices[-2] == 0
    strangers = make_pairs(["x"] * 4, [picture(i) for i in range(4)], count=6)
    assert Ballot(strangers, ballot.path).position == 0


def test_a_damaged_ballot_names_the_line(pairs, tmp_path):
    path = tmp_path / "votes.jsonl"
    path.write_text(json.dumps({"pair": "a", "choice": "left"}) + "\n{not json\n")
    with pytest.raises(ValueError, match="votes.jsonl, line 2: not a vote"):
        Ballot(pairs, path)


def test_a_wrong_choice_is_refused_and_a_full_ballot_too(pairs, tmp_path):
    ballot = Ballot(pairs[:1], tmp_path / "votes.jsonl")
    with pytest.raises(ValueError, match="choice 'both': expected one of left, right, skip"):
        ballot.vote("both")
    ballot.vote("left")
    with pytest.raises(IndexError, match="all 1 pairs have a vote"):
        ballot.vote("left")


def test_the_widget_votes_and_takes_back(pairs, tmp_path):
    seen = []
    ballot = Ballot(pairs[:3], tmp_path / "votes.jsonl")
    widget = ballot_widget(ballot, on_vote=lambda b: seen.append(b.position))
    assert widget.prompt == pairs[0].prompt and widget.left.startswith("data:image/png;base64,")
    for choice in ("left", "right", "undo", "skip", "left", "left"):
        widget._handle_custom_msg({"choice": choice}, [])
    assert seen == [1, 2, 1, 2, 3, 3] and widget.position == 3
    assert ballot.choices[0] == 1 and ballot.choices[1].isnan() and ballot.choices[2] == 1


def test_fit_equals_logistic_regression_of_torch():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 4, generator=generator, dtype=torch.float64)
    y = (torch.rand(50, generator=generator) < 0.5).double()
    w = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [w],
        max_iter=200,
        tolerance_grad=1e-12,
        tolerance_change=1e-16,
        line_search_fn="strong_wolfe",
    )

    def loss():
        optimizer.zero_grad()
        logits = x @ w
        value = torch.nn.functional.binary_cross_entropy_with_logits(logits, y, reduction="sum")
        value = value + 1.5 * w.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    torch.testing.assert_close(bradley_terry(x, y, penalty=3.0), w.detach(), atol=1e-6, rtol=0)


def test_a_scripted_voter_is_recovered(pairs, tmp_path):
    ballot = Ballot(pairs, tmp_path / "votes.jsonl")
    ballot.ask(
        lambda p: "left" if p.left.getpixel((0, 0))[0] > p.right.getpixel((0, 0))[0] else "right"
    )
    left, right = (redness([getattr(p, side) for p in pairs]) for side in ("left", "right"))
    taste = fit_taste(left, right, ballot.choices)
    assert taste.votes == 40 and taste.accuracy >= 0.9
    features = redness([picture(v) for v in range(0, 250, 7)])
    found = taste_agreement(left, right, ballot.choices, features, features[:, 0])
    assert found.low > 0.95


def test_too_few_votes_are_refused():
    votes = torch.tensor([1.0] * 9 + [float("nan")] * 30)
    with pytest.raises(ValueError, match="9 votes are too few"):
        fit_taste(torch.randn(39, 2), torch.randn(39, 2), votes)


def test_the_reward_scores_as_the_taste_does(pairs, tmp_path):
    left, right = (redness([getattr(p, side) for p in pairs]) for side in ("left", "right"))
    taste = fit_taste(left, right, (left[:, 0] > right[:, 0]).double())
    save_taste(taste, tmp_path / "new" / "taste.safetensors", f"{__name__}:redness")
    reward = make_reward("votes", path=str(tmp_path / "new" / "taste.safetensors"))
    images = [picture(v) for v in (0, 100, 200)]
    values = score(reward, images, ["p"] * 3)
    assert values.tolist() == sorted(values.tolist()) and values[2] > values[0]
    torch.testing.assert_close(values, taste.score(redness(images)))
    (tmp_path / "bad.safetensors").write_bytes(b"no")
    with pytest.raises(RewardUnavailable, match="bad.safetensors: no taste in this file"):
        load_taste(tmp_path / "bad.safetensors")


def test_an_image_folder_of_the_hub_is_read(tmp_path):
    picture(9).save(tmp_path / "0.png")
    table = tmp_path / "metadata.jsonl"
    table.write_text(
        '{"file_name": "0.png", "text": "a cat"}\n{"file_name": "0.png", "prompt": "b"}\n'
    )
    prompts, images = read_image_folder(tmp_path)
    assert prompts == ["a cat", "b"] and images[1].getpixel((0, 0)) == (9, 0, 246)
    table.write_text('{"file_name": "none.png", "prompt": "a"}\n')
    with pytest.raises(ValueError, match="metadata.jsonl, line 1: FileNotFoundError"):
        read_image_folder(tmp_path)


def test_prompts_of_an_image_folder_may_hold_any_character_but_a_line_feed(tmp_path):
    Image.new("RGB", (2, 2)).save(tmp_path / "0.png")
    row = json.dumps({"file_name": "0.png", "prompt": "a\u2028b\x85c"}, ensure_ascii=False)
    (tmp_path / "metadata.jsonl").write_text(row + "\n\n", encoding="utf-8")
    assert read_image_folder(tmp_path)[0] == ["a\u2028b\x85c"]


def test_pairs_that_differ_most_come_first():
    images = [picture(v) for v in (0, 10, 200)]
    features = redness(images)
    (pair,) = make_pairs(["a square"] * 3, images, count=1, features=features)
    assert {pair.left.getpixel((0, 0))[0], pair.right.getpixel((0, 0))[0]} == {0, 200}
