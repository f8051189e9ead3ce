"""How a batch of pairs is laid out for the model: as it comes, or with each prompt computed once for both answers.

A pair is a small tree: the tokens that chosen and rejected have in common, then two branches. Shared, the trees of a
batch stand in rows of their own, with positions that are repeated in the second branch and a mask in which each token
sees its own ancestors alone. The last token of an answer predicts nothing and is left out.

Shapes: `B` pairs, `T` tokens of the longest text, `M` tokens of all trees, `R` rows of `N` places, `K` predictions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch


@dataclass(frozen=True)
class Tree:
    """One pair: how many tokens the texts share, and how many follow in each branch (the last of each left out)."""

    stem: int
    first: int
    second: int

    @property
    def size(self) -> int:
        return self.stem + self.first + self.second

    def place(self, branch: int, position: int) -> int:
        """Where a token stands in the order stem, first branch, second branch."""
        return position if position < self.stem or branch == 0 else position + self.first


@dataclass(frozen=True)
class Layout:
    """What the model gets, and where everything is in it. Places are counted through the rows, `R·N` in all.

    Attributes:
        input_ids: `[R, N]`.
        attention_mask: `[R, N]`, or boolean `[R, 1, N, N]` where prompts are shared.
        position_ids: `[R, N]`, or None where they are the model's own.
        sources: `[K]`, places whose logits predict.
        targets: `[K]`, the tokens predicted.
        rows, columns: `[K]`, where they stand in `labels[:, 1:]`.
        take: `[M]`, the place of each token of the trees.
        fill: `[R·N]`, the token of the trees at each place, `M` at places that need none.
        trees: the pairs.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    position_ids: torch.Tensor | None
    sources: torch.Tensor
    targets: torch.Tensor
    rows: torch.Tensor
    columns: torch.Tensor
    take: torch.Tensor
    fill: torch.Tensor
    trees: tuple[Tree, ...]

    def model_inputs(self) -> dict[str, torch.Tensor]:
        """The keyword arguments for the model."""
        inputs = {"input_ids": self.input_ids, "attention_mask": self.attention_mask}
        return inputs if self.position_ids is None else {**inputs, "position_ids": self.position_ids}

    def tree_masks(self) -> list[torch.Tensor]:
        """The mask of each pair alone, `[n, n]`, of a shared layout of one row."""
        mask, stops = self.attention_mask[0, 0], list(accumulate(tree.size for tree in self.trees))
        return [mask[i:j, i:j] for i, j in zip([0, *stops[:-1]], stops, strict=True)]

    def spread(self, tokens: torch.Tensor) -> torch.Tensor:
        """Values of tree tokens `[M, H]` at their places, `[R, N, H]`; zero elsewhere."""
        padded = torch.cat([tokens, tokens.new_zeros(1, tokens.shape[1])])
        return padded[self.fill.to(tokens.device)].view(*self.input_ids.shape, -1)

    def gather(self, states: torch.Tensor) -> torch.Tensor:
        """Values `[R, N, H]` of the tree tokens, `[M, H]`."""
        return states.flatten(0, 1)[self.take.to(states.device)]


def in_fixed_order(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """The rows of a batch `[2B, T]` such that a pair's texts come in the same order whichever of them is chosen.

    Then a pair is computed alike in both directions of training, up to the last bit of half precision.

    Returns:
        `[2B]`, the rows to take; applied twice it changes nothing.
    """
    count = len(input_ids) // 2
    texts = [ids[:length].tolist() for ids, length in zip(input_ids, attention_mask.sum(dim=1).tolist(), strict=True)]
    order = torch.arange(2 * count)
    for row in range(count):
        if texts[row + count] < texts[row]:
            order[row], order[row + count] = row + count, row
    return order


def trees_of(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[Tree, ...]:
    """The pairs of a batch `[2B, T]`, padded on the right, chosen in the first half and rejected in the second."""
    lengths = (attention_mask.sum(dim=1) - 1).tolist()
    first, second = input_ids.chunk(2)
    agree = (first == second).to(torch.uint8).cumprod(dim=1).sum(dim=1).tolist()
    trees = []
    for length, other, common in zip(lengths[: len(first)], lengths[len(first) :], agree, strict=True):
        stem = min(length, other, common)
        trees.append(Tree(stem, length - stem, other - stem))
    return tuple(trees)


def plain_layout(input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor) -> Layout:
    """The batch as it is, a row for each text.

    Args:
        input_ids: `[2B, T]`.
        attention_mask: `[2B, T]`, padding on the right.
        labels: `[2B, T]`, −100 where nothing is predicted.
    """
    trees = trees_of(input_ids, attention_mask)
    rows, columns, targets = _predictions(labels)
    count, width = len(trees), input_ids.shape[1]
    take, fill, start = [], torch.full((2 * count, width), sum(tree.size for tree in trees)), 0
    for index, tree in enumerate(trees):
        whole, other = index * width, (index + count) * width
        take += [torch.arange(whole, whole + tree.stem + tree.first)]
        take += [torch.arange(other + tree.stem, other + tree.stem + tree.second)]
        for branch, length in enumerate((tree.stem + tree.first, tree.stem + tree.second)):
            places = torch.tensor([tree.place(branch, position) for position in range(length)], dtype=torch.long)
            fill[index + branch * count, :length] = start + places
        start += tree.size
    return Layout(
        input_ids, attention_mask, None, rows * width + columns, targets, rows, columns,
        torch.cat(take), fill.flatten(), trees,
    )  # fmt: skip


def shared_layout(
    input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor, hidden_size: int | None = None
) -> Layout:
    """Each prompt once: the arguments as for `plain_layout`, and H, by which the number of rows is chosen; without it
    all pairs stand in one."""
    trees = trees_of(input_ids, attention_mask)
    count = len(trees)
    starts, width = _place_trees([tree.size for tree in trees], hidden_size)
    height = max(start // width for start in starts) + 1
    ids = torch.zeros(height * width, dtype=input_ids.dtype)
    positions, pairs, branches = (torch.full((height * width,), value) for value in (0, -1, 0))
    for index, (tree, start) in enumerate(zip(trees, starts, strict=True)):
        here = slice(start, start + tree.size)
        stem, first, second = tree.stem, tree.stem + tree.first, tree.stem + tree.second
        ids[here] = torch.cat([input_ids[index, :first], input_ids[index + count, stem:second]])
        positions[here] = torch.cat([torch.arange(first), torch.arange(stem, second)])
        pairs[here] = index
        branches[here] = torch.tensor([0, 1, 2]).repeat_interleave(torch.tensor([stem, tree.first, tree.second]))
    rows, columns, targets = _predictions(labels)
    sources = [
        starts[row % count] + trees[row % count].place(row // count, column)
        for row, column in zip(rows.tolist(), columns.tolist(), strict=True)
    ]
    take = torch.cat([torch.arange(start, start + tree.size) for start, tree in zip(starts, trees, strict=True)])
    fill = torch.full((height * width,), len(take))
    fill[take] = torch.arange(len(take))
    shape = (height, width)
    return Layout(
        ids.view(shape), tree_mask(*(t.view(shape) for t in (pairs, branches, positions))), positions.view(shape),
        torch.tensor(sources, dtype=torch.long), targets, rows, columns, take, fill, trees,
    )  # fmt: skip


def tree_mask(pairs: torch.Tensor, branches: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Who sees whom: a token its own pair, the stem and its own branch, up to its own position.

    Args:
        pairs: `[R, N]`, number of the pair, −1 at places without a token (which see each other, so that none sees
            nothing).
        branches: `[R, N]`, 0 in the stem, 1 and 2 in the branches.
        positions: `[R, N]`, position in its text.

    Returns:
        boolean `[R, 1, N, N]`, queries by keys.
    """
    pair = pairs[:, :, None] == pairs[:, None, :]
    line = (branches[:, None, :] == 0) | (branches[:, None, :] == branches[:, :, None])
    earlier = positions[:, None, :] <= positions[:, :, None]
    return (pair & line & earlier)[:, None]


def _place_trees(sizes: Sequence[int], hidden_size: int | None) -> tuple[list[int], int]:
    """Where each tree starts, and the width of a row: all in one row, or a row for each, whichever costs less.

    One row has no padding, but attention grows with the square of its width. A layer multiplies each token with about
    `12·H²` weights and each pair of places with `2·H` numbers.
    """
    together, widest = sum(sizes), max(sizes)
    one, many = (
        rows * ((6 * hidden_size) * width + width**2) if hidden_size else rows
        for rows, width in ((1, together), (len(sizes), widest))
    )
    if one <= many:
        return [0, *accumulate(sizes[:-1])], together
    return [index * widest for index in range(len(sizes))], widest


def _predictions(labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows and columns in `labels[:, 1:]` of what is predicted, and the tokens."""
    targets = labels[:, 1:]
    rows, columns = (targets != -100).nonzero(as_tuple=True)
    return rows, columns, targets[rows, columns]
