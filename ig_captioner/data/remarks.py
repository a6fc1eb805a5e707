"""Warnings about many inputs, put together: what was said, about how many, and the names of the first."""

import warnings
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

from .. import input_rules
from ..input_rules import IGCaptionerWarning


class Remarks:
    """Collects the package's warnings about one input after another, to say each of them once in the end."""

    def __init__(self) -> None:
        self.names: defaultdict[str, list[str]] = defaultdict(list)
        self.passed: set[tuple[str, str, int]] = set()  # other libraries' warnings, which Python shows once, too

    @contextmanager
    def about(self, name: str) -> Iterator[None]:
        """Collects what is warned inside; where warnings are errors, they stay errors."""
        with warnings.catch_warnings(record=True) as caught:
            if not _is_an_error():
                warnings.simplefilter("always", IGCaptionerWarning)
            yield
        for warning in caught:
            if issubclass(warning.category, IGCaptionerWarning):
                self.names[str(warning.message)].append(name)
            elif (key := (str(warning.message), warning.filename, warning.lineno)) not in self.passed:
                self.passed.add(key)
                warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)

    def tell(self) -> None:
        """Says each remark once, with the number of inputs that it is about and the first of their names."""
        for message, names in self.names.items():
            input_rules.tell(message, names)
        self.names.clear()


def _is_an_error() -> bool:
    """Tells whether a warning of the package would raise: the first filter for it decides."""
    for action, message, category, module, _ in warnings.filters:
        if issubclass(IGCaptionerWarning, category) and message is None and module is None:
            return action == "error"
    return False
