"""Questions about long contexts whose answers are known: RULER's forms in our own words.

Nothing is downloaded: words are made of syllables, numbers and ids are drawn from a seed, and
quotes come from Python's library or a document of the user's. A prompt ends with the beginning of
its answer, so that a model without instruction tuning continues it.
"""

from __future__ import annotations

from .counting import CommonWords, FrequentWords
from .needles import ContextNeedles, MultiKeyIds, MultiKeyWords, MultiValue, SingleNeedle
from .quotes import Quotes
from .sample import Sample, Task
from .variables import Variables

__all__ = ["NAMES", "Sample", "Task", "tasks_of"]

_MADE_UP: tuple[type[Task], ...] = (
    SingleNeedle,
    ContextNeedles,
    MultiKeyWords,
    MultiKeyIds,
    MultiValue,
    Variables,
    CommonWords,
    FrequentWords,
)
NAMES = (Quotes.name, *(task.name for task in _MADE_UP))


def tasks_of(names: list[str], document: str | None = None) -> list[Task]:
    """The tasks of these names; quotes are from ``document``, without one from Python's library.

    Raises ValueError for a name that no task has.
    """
    known: dict[str, Task] = {task.name: task() for task in _MADE_UP}
    known[Quotes.name] = Quotes(document)
    for name in names:
        if name not in known:
            raise ValueError(f"there is no task {name!r}; choose from {', '.join(NAMES)}")
    return [known[name] for name in names]
