"""Takes items before they are asked for, in a thread of their own."""

import collections
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from videollm_mod_jax.errors import UserError

DEPTH = 4
"""Items that wait where nobody says otherwise: enough to bridge an answer's uneven work."""

Item = TypeVar("Item")
_END = object()


def ahead(items: Iterable[Item], depth: int) -> Iterator[Item]:
    """The same items in the same order, up to `depth` of them taken before they are asked for.

    ```
    depth 2    given      .     a     b     c
               taken     a b   b c   c d   d e      in the thread, while the caller works
    ```

    Nothing is taken before the first item is asked for. The thread ends with the items, with an
    exception, which comes out in place of the item that it kept from coming, or when the iterator
    is closed or forgotten: at most the item that is being taken is waited for.

    Args:
      items: taken one after another.
      depth: how many may wait to be asked for.

    Raises:
      UserError: depth below 1.
    """
    if depth < 1:
        raise UserError(f"depth is {depth}; expected at least 1")
    return _ahead(iter(items), depth)


def _ahead(items: Iterator[Item], depth: int) -> Iterator[Item]:
    worker = ThreadPoolExecutor(1, thread_name_prefix="ahead")
    try:
        coming = collections.deque(worker.submit(next, items, _END) for _ in range(depth))
        while (item := coming.popleft().result()) is not _END:
            coming.append(worker.submit(next, items, _END))
            yield item
    finally:
        worker.shutdown(cancel_futures=True)
