"""From records to batches of fixed shape, by Grain.

The order of the examples is a function of the seed alone: not of the number of processes that share
a batch, nor of the workers that load it. So the state of the iterator is one integer, the number of
the next batch.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import grain
import numpy as np
from absl import flags

from videollm_mod_jax import signals
from videollm_mod_jax.data import augment, dialogue, example
from videollm_mod_jax.data.annotations import Record, frame_range
from videollm_mod_jax.data.features import FeatureSource
from videollm_mod_jax.data.tokenizer import Tokenizer
from videollm_mod_jax.errors import UserError

# Grain's default keeps 500 elements in flight per worker: gigabytes, when an element is a video.
_READ = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)


@dataclasses.dataclass(frozen=True)
class Examples:
    """A dataset as a sequence of examples; picklable, so that workers can load it.

    Attributes:
      records: of the dataset.
      features: of their videos.
      tokenizer: encodes the dialogue.
      tokens_per_frame: N of the model, how many positions of the sequence a frame takes.
      system: the instruction that opens every conversation.
      budget: the sizes of an example.
      training: whether the conversations are to learn from: one that exceeds the budget then ends
        early, and answers are disturbed. Otherwise it is an error.
      disturb: how to disturb the answers when training, None for never.
    """

    records: Sequence[Record]
    features: FeatureSource
    tokenizer: Tokenizer
    tokens_per_frame: int
    system: str
    budget: example.Budget
    training: bool = False
    disturb: augment.Disturbance | None = None

    def __len__(self) -> int:
        return len(self.records)

    def conversation(self, index: int) -> dialogue.Conversation:
        """The whole, undisturbed conversation of record `index`."""
        return dialogue.conversation_of(self.records[index], self.features.meta.fps, self.system)

    def turns(self, index: int) -> tuple[example.Turn, ...]:
        """The turns of record `index`, whose slots point into the example of `load(index)`."""
        return example.turns_of(self.conversation(index), self.tokenizer, self.tokens_per_frame)

    def load(self, index: int, rng: np.random.Generator | None = None) -> dict[str, np.ndarray]:
        """The arrays of record `index` (see `build_example`), disturbed when `rng` is given.

        Raises:
          UserError: a video without features, or a conversation that does not fit.
        """
        record, conversation = self.records[index], self.conversation(index)
        if self.training:
            conversation = example.fit(
                conversation, self.tokenizer, self.tokens_per_frame, self.budget
            )
        if rng is not None and self.disturb is not None:
            conversation = augment.disturb(conversation, self.disturb, rng)
        return example.build_example(
            conversation,
            self.frames(record)[: dialogue.count_frames(conversation)],
            self.tokenizer,
            self.tokens_per_frame,
            self.budget,
            record.id,
        )

    def count_cut(self, sample: int) -> tuple[int, int]:
        """How many conversations end early when they are learnt from.

        Args:
          sample: how many to look at, evenly spaced.

        Returns:
          How many of them are cut, and how many were looked at.
        """
        indices = np.unique(np.linspace(0, len(self) - 1, sample).astype(int))
        whole = [self.conversation(int(index)) for index in indices]
        fitting = (
            example.fit(one, self.tokenizer, self.tokens_per_frame, self.budget) for one in whole
        )
        return sum(a != b for a, b in zip(whole, fitting, strict=True)), len(indices)

    def frames(self, record: Record) -> np.ndarray:
        """The features of the frames of a record: [F, N, W].

        Raises:
          UserError: they are not all there.
        """
        frames = frame_range(record, self.features.meta.fps)
        return self.features.read(record.video, frames.start, frames.stop, frames.step)


Mixture = Sequence[tuple[Examples, float]]
"""Datasets and the shares of the examples that come from each; shares need not sum to 1."""


def training_batches(
    mixture: Mixture,
    batch_size: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
    start_batch: int = 0,
    num_workers: int = 0,
) -> Iterator[dict[str, np.ndarray]]:
    """Shuffled batches without end; every epoch has another order, a batch may span two epochs.

    Every dataset of a mixture is shuffled and repeated by itself; they then take turns, as evenly
    as their shares allow. Global batch b holds the elements b * B .. (b + 1) * B of that; process
    p of P takes rows p * B/P .. (p + 1) * B/P of it.

    ```
    shares 2 and 1      a3 a0 b1 a2 a4 b0 a1 a3' b2 ...      a1 ends an epoch of a, a3' begins one
    ```

    Args:
      mixture: what to load.
      batch_size: B, over all processes.
      seed: of the order and of the disturbance.
      process_index: p.
      process_count: P, which divides B.
      start_batch: the first global batch to give: the next one after a checkpoint.
      num_workers: processes that load ahead; 0 loads in threads. A script that uses workers needs
        `if __name__ == "__main__":`.

    Returns:
      A generator of batches, `build_example` with a leading axis B/P; close it to stop workers.

    Raises:
      UserError: B does not divide, a share is not positive, or a dataset is empty.
    """
    rows = _rows(batch_size, process_index, process_count)
    datasets = [examples for examples, _ in mixture]

    def load(batch: int, numbers: np.ndarray) -> dict[str, np.ndarray]:
        signals.end_with_parent()
        rngs = (np.random.default_rng((seed, batch, row)) for row in range(batch_size)[rows])
        found = (_locate(datasets, int(number)) for number in numbers[rows])
        return _stack([one.load(index, rng) for (one, index), rng in zip(found, rngs, strict=True)])

    # Batches of numbers first, and whole batches as elements, so that neither the split over
    # processes nor the one over workers moves an example to another batch.
    dataset = _numbers(mixture, seed).batch(batch_size, drop_remainder=True)
    dataset = dataset.map_with_index(load)[start_batch:]
    dataset = dataset.to_iter_dataset(_READ)
    if num_workers:
        if not flags.FLAGS.is_parsed():  # Grain reads absl flags when it starts workers
            flags.FLAGS.mark_as_parsed()
        dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers, 2))
    return _copies(iter(dataset))


def _numbers(mixture: Mixture, seed: int) -> grain.MapDataset:
    """The examples of a mixture in the order of training, numbered through its datasets."""
    parts, first = [], 0
    for examples, share in mixture:
        if not len(examples):
            raise UserError(
                f"{examples.features.path}: expected a training split of 1 record or more, found "
                "none"
            )
        if share <= 0:
            raise UserError(f"the share of a dataset is {share}; expected more than 0")
        numbers = grain.MapDataset.range(first, first + len(examples))
        parts.append(numbers.seed(seed).shuffle().repeat(None))
        first += len(examples)
    return grain.MapDataset.mix(parts, [share for _, share in mixture])


def _locate(datasets: Sequence[Examples], number: int) -> tuple[Examples, int]:
    """The dataset of an example that is numbered through all of them, and its index there."""
    for examples in datasets:
        if number < len(examples):
            return examples, number
        number -= len(examples)
    raise IndexError(number)


def evaluation_batches(
    examples: Examples, batch_size: int, process_index: int = 0, process_count: int = 1
) -> Iterator[dict[str, np.ndarray]]:
    """All examples once, in order; rows are split over processes as in `training_batches`.

    Yields:
      Batches with, beside the arrays of `build_example`, `example_index` (B/P,) int32 and
      `example_valid` (B/P,) bool. The last batch is filled up with rows that are not valid and
      whose labels are all padding.
    """
    rows = _rows(batch_size, process_index, process_count)
    for start in range(0, len(examples), batch_size):
        indices = np.arange(start, start + batch_size)[rows]
        valid = indices < len(examples)
        indices = np.minimum(indices, len(examples) - 1)
        batch = _stack([examples.load(int(i)) for i in indices])
        batch["label_kinds"] *= valid[:, None]
        yield batch | {"example_index": indices.astype(np.int32), "example_valid": valid}


def _rows(batch_size: int, process_index: int, process_count: int) -> slice:
    local, rest = divmod(batch_size, process_count)
    if rest or not local:
        raise UserError(
            f"batch size: expected a multiple of the {process_count} processes, found {batch_size}"
        )
    return slice(process_index * local, (process_index + 1) * local)


def _copies(iterator: grain.DatasetIterator) -> Iterator[dict[str, np.ndarray]]:
    """Batches that outlive the workers, whose memory they come in; closing it stops the workers."""
    try:
        for batch in iterator:
            yield {key: np.array(array) for key, array in batch.items()}
    finally:
        iterator.close()


def _stack(loaded: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {key: np.stack([one[key] for one in loaded]) for key in loaded[0]}
