"""The layouts, token by token."""

from __future__ import annotations

import pytest
import torch

from steer_adapter.learn.sharing import Tree, in_fixed_order, plain_layout, shared_layout, tree_mask, trees_of


# Two pairs: prompts [5 6 7] and [8 9]; completions [1 2 | 3 4 2], [4 | 6 7]; in the second pair both answers differ.
CHOSEN, REJECTED = [[5, 6, 7, 1, 2], [8, 9, 4]], [[5, 6, 7, 3, 4, 2], [8, 9, 6, 7]]
PROMPTS = [3, 2]


def batch() -> tuple[torch.Tensor, ...]:
    ids, mask, labels = (torch.full((4, 6), value) for value in (0, 0, -100))
    for row, text in enumerate(CHOSEN + REJECTED):
        ids[row, : len(text)] = torch.tensor(text)
        mask[row, : len(text)] = 1
        labels[row, PROMPTS[row % 2] : len(text)] = torch.tensor(text[PROMPTS[row % 2] :])
    return ids, mask, labels


def test_the_trees():
    ids, mask, _ = batch()
    assert trees_of(ids, mask) == (Tree(3, 1, 2), Tree(2, 0, 1))


def test_shared():
    layout = shared_layout(*batch(), hidden_size=32)
    assert layout.input_ids.tolist() == [[5, 6, 7, 1, 3, 4, 8, 9, 6]]
    assert layout.position_ids.tolist() == [[0, 1, 2, 3, 3, 4, 0, 1, 2]]
    seen = [[i for i in range(9) if layout.attention_mask[0, 0, j, i]] for j in range(9)]
    assert seen == [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 1, 2, 4], [0, 1, 2, 4, 5], [6], [6, 7], [6, 7, 8]]
    assert [len(mask) for mask in layout.tree_masks()] == [6, 3]


@pytest.mark.parametrize("hidden_size", [None, 1, 10_000])
@pytest.mark.parametrize("shared", [False, True])
def test_each_prediction_has_its_own_text_behind_it(shared, hidden_size):
    """For every predicted token: the tokens that its source sees, by position, are the text before it."""
    ids, mask, labels = batch()
    layout = shared_layout(ids, mask, labels, hidden_size) if shared else plain_layout(ids, mask, labels)
    width = layout.input_ids.shape[1]
    wanted = [(r, c) for r in range(4) for c in range(5) if labels[r, c + 1] != -100]
    assert list(zip(layout.rows.tolist(), layout.columns.tolist(), strict=True)) == wanted
    for source, target, (row, column) in zip(layout.sources.tolist(), layout.targets.tolist(), wanted, strict=True):
        place, at = divmod(source, width)
        visible = layout.attention_mask[place, 0, at] if shared else torch.arange(width) <= at
        assert layout.input_ids[place, visible.bool()].tolist() == ids[row, : column + 1].tolist()
        assert target == int(ids[row, column + 1])


@pytest.mark.parametrize("hidden_size", [None, 1, 10_000])
@pytest.mark.parametrize("shared", [False, True])
def test_states_are_taken_and_put_back(shared, hidden_size):
    ids, mask, labels = batch()
    layout = shared_layout(ids, mask, labels, hidden_size) if shared else plain_layout(ids, mask, labels)
    tokens = layout.gather(layout.input_ids[..., None].float())
    assert tokens[:, 0].tolist() == [5, 6, 7, 1, 3, 4, 8, 9, 6]
    back = layout.spread(tokens)[..., 0]
    for source in layout.sources.tolist():
        assert back.flatten()[source] == layout.input_ids.flatten()[source] != 0
    if not shared:
        assert back[2].tolist() == [5, 6, 7, 3, 4, 0], "the last token predicts nothing"


def test_a_row_for_each_pair_where_attention_would_cost_more():
    ids = torch.arange(1, 4 * 40 + 1).view(4, 40)
    mask = (torch.arange(40)[None] < torch.tensor([[40], [30], [40], [30]])).long()
    assert shared_layout(ids, mask, ids, hidden_size=1).input_ids.shape == (2, 78)
    assert shared_layout(ids, mask, ids, hidden_size=1000).input_ids.shape == (1, 136)


def test_no_place_sees_nothing():
    mask = tree_mask(torch.tensor([[0, 0, -1, -1]]), torch.tensor([[0, 1, 0, 0]]), torch.tensor([[0, 1, 0, 0]]))
    assert mask.any(dim=-1).all() and not mask[0, 0, :2, 2:].any()


def test_a_pair_comes_in_the_same_order_whichever_text_is_chosen():
    ids = torch.tensor([[5, 7, 8, 0], [5, 6, 0, 0], [5, 6, 9, 9], [5, 6, 2, 0]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 0]])
    order = in_fixed_order(ids, mask)
    assert order.tolist() == [2, 1, 0, 3]
    assert order[order].tolist() == [0, 1, 2, 3]
    exchanged = torch.tensor([2, 3, 0, 1])
    again = in_fixed_order(ids[exchanged], mask[exchanged])
    assert torch.equal(ids[exchanged][again], ids[order]) and torch.equal(mask[exchanged][again], mask[order])
