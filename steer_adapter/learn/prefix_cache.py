"""What enters the first steered layer, and the reference, computed once for each pair and used in every step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from tqdm.auto import tqdm

from .cache import Entry, StateCache, pair_key
from .forward import PairForward
from .prefix import Prefix


Batch = Mapping[str, torch.Tensor]
Reference = Callable[[Batch], tuple[torch.Tensor, torch.Tensor]]
REFERENCE_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")


class PrefixCache:
    """
    The entries of a run's pairs, and the forward that uses them.

    Args:
        forward: what runs for preference batches; its layout says where each token is.
        prefix: the layers that are replaced.
        cache: where entries live.
        reference: the reference log-probabilities of a batch `[2B, T]`, chosen and rejected, `[B]` each, by a forward
            of the model with the vector off.
        others: layers that are recorded along, for trainers that come later.
    """

    def __init__(
        self,
        forward: PairForward,
        prefix: Prefix,
        cache: StateCache,
        reference: Reference,
        others: Sequence[tuple[Prefix, StateCache]] = (),
    ) -> None:
        self.forward, self.prefix, self.cache, self.reference = forward, prefix, cache, reference
        self.recorded = [(prefix, cache), *others]
        self.active = False
        self._entries: list[Entry] = []
        forward.prefix = prefix

    def build(self, batches: Iterable[Batch], total: int, silent: bool) -> None:
        """Record every batch that holds a pair not known yet, as a whole: a pair's numbers depend on its neighbors,
        and are the same however often a build is interrupted."""
        for batch in tqdm(batches, total=total, desc="Caching the frozen layers", unit="batch", disable=silent):
            if any(key not in cache for _, cache in self.recorded for key in keys_of(batch)):
                self._record(batch)

    def ensure(self, batch: Batch) -> None:
        """Record the pairs of a batch that are not known, each by itself: so its numbers depend on nothing else."""
        for index, key in enumerate(keys_of(batch)):
            if self.cache.get(key) is None:
                self._record(one_pair(batch, index))

    @contextmanager
    def replaying(self) -> Iterator[None]:
        """Inside, batches that went through `with_reference` run above the frozen layers alone."""
        self.active = True
        try:
            with self.prefix.replaying(self._tokens):
                yield
        finally:
            self.active, self._entries = False, []

    def with_reference(self, batch: Batch) -> dict[str, torch.Tensor]:
        """The batch with its reference log-probabilities, where it has none. Its entries serve the next forward."""
        found = [self.cache.get(key) for key in keys_of(batch)]
        self._entries = [entry for entry in found if entry is not None]
        if len(self._entries) != len(found):
            raise RuntimeError("Entries of the prefix cache were damaged while the batch ran.")
        columns = torch.stack([entry.reference for entry in self._entries], dim=1).float()
        device = batch["input_ids"].device
        known = {name: column.to(device) for name, column in zip(REFERENCE_COLUMNS, columns, strict=True)}
        return {**known, **batch}

    def disagreement(self, batch: Batch) -> float:
        """The relative error of the reference log-probabilities by way of the cache; 0 would be exact."""
        with self.prefix.recording():  # also without a pair to record: it sees what the layers return
            wanted = torch.cat(self.reference(batch)).double()
        self.ensure(batch)
        with self.replaying():
            self.with_reference(batch)
            received = torch.cat(self.reference(batch)).double()
        return float(((received - wanted).abs() / wanted.abs().clamp(min=1)).max())

    def close(self) -> None:
        """Let go of the model."""
        self.forward.prefix = None

    def _record(self, batch: Batch) -> None:
        with ExitStack() as stack:
            seen = [stack.enter_context(prefix.recording()) for prefix, _ in self.recorded]
            reference = torch.stack(self.reference(batch), dim=1).double().cpu()
        layout = self.forward.layout
        if layout is None or any(len(states) != 1 for states in seen):
            raise RuntimeError(f"The forward of a batch met the steered layer {len(seen[0])} times, expected once.")
        sizes = [tree.size for tree in layout.trees]
        for (_, cache), (states,) in zip(self.recorded, seen, strict=True):
            parts = layout.gather(states).cpu().split(sizes)
            for key, part, values in zip(keys_of(batch), parts, reference, strict=True):
                cache.put(key, Entry(part.clone(), values.clone()))

    def _tokens(self) -> torch.Tensor:
        """The states of a batch, in the order of its trees."""
        return torch.cat([entry.states for entry in self._entries])


def keys_of(batch: Batch) -> list[bytes]:
    """The key of each pair of a batch as TRL's collator makes them, not exchanged."""
    ids, completions = batch["input_ids"].cpu(), batch["completion_mask"].cpu()
    lengths = batch["attention_mask"].sum(dim=1).tolist()
    starts = completions.argmax(dim=1).tolist()
    count = len(ids) // 2
    return [
        pair_key(
            ids[i, : lengths[i]].tolist(),
            ids[i + count, : lengths[i + count]].tolist(),
            (starts[i], starts[i + count]),
        )
        for i in range(count)
    ]


def one_pair(batch: Batch, index: int) -> dict[str, torch.Tensor]:
    """A batch of one of its pairs, without padding that the others needed."""
    count = len(batch["input_ids"]) // 2
    length = int(batch["attention_mask"][[index, index + count]].sum(dim=1).max())
    texts = {name: batch[name] for name in ("input_ids", "attention_mask", "completion_mask")}
    return {name: value[[index, index + count], :length] for name, value in texts.items()}
