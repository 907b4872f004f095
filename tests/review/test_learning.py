"""Active learning on a simulated season; `bench/learning.py` compares all strategies."""

from bench.learning import BUDGET, NEAR, all_labels, learn, share_needed, simulate


def test_a_quarter_of_the_labels_is_enough():
    season = simulate(0)
    goal = all_labels(season) - NEAR
    reached = learn(season, "margin")
    assert reached[0] < goal, "the first head is not there yet"
    assert share_needed(reached, goal) <= BUDGET
