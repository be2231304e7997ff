"""The training as a picture, of each road, and none where there is nothing to draw."""

import pytest
from matplotlib.image import imread
from support.cards import run_of

from autosloth.publish.card import render_card
from autosloth.publish.curve import draw_curve, draw_losses


@pytest.mark.parametrize("road", ["sft", "dpo", "spin"])
def test_a_picture_wide_enough_for_the_hub_is_drawn(road, tmp_path):
    run = run_of(f"{road}-adapter", tmp_path)
    if road == "dpo":
        run.record("train", rewards=[[step, -200.0, -190.0, 0.01 * step, 1.0] for step in range(1, 61)])
    assert draw_curve(run, tmp_path / "loss.png")
    height, width, _ = imread(tmp_path / "loss.png").shape
    assert width >= 700 and height >= 300 and "](loss.png)" in render_card(run)


def test_without_steps_there_is_no_picture_and_the_card_shows_none(tmp_path):
    run = run_of("sft-adapter", tmp_path)
    run.record("train", losses=[[1, 1.61]])
    assert not draw_curve(run, tmp_path / "loss.png")
    assert not (tmp_path / "loss.png").exists() and "loss.png" not in render_card(run)


def test_the_held_out_losses_on_the_way_and_the_weights_kept_are_in_the_picture(tmp_path):
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    draw_losses(axes, run_of("sft-merged", tmp_path).facts, "sft")
    lines = {line.get_label(): list(map(list, line.get_data())) for line in axes.get_lines()}
    assert lines["held out, on the way"] == [[20, 40, 60], [1.1, 1.0, 1.02]]
    assert lines["held out, before and with the weights of step 40"][0] == [0, 40]
