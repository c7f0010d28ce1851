"""What an integration puts in the place of another package's functions while it is needed."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any


class Hooks:
    """Ours in these places, (owner, name, ours), while a `with` block of any thread is open."""

    def __init__(self, places: Sequence[tuple[Any, str, Any]]) -> None:
        self.places = places
        self.lock, self.users = threading.Lock(), 0
        self.before = {(owner, name): vars(owner)[name] for owner, name, _ in places}

    def original(self, owner: Any, name: str) -> Any:
        return self.before[owner, name]

    def __enter__(self) -> None:
        with self.lock:
            self.users += 1
            if self.users == 1:
                for owner, name, ours in self.places:
                    self.before[owner, name] = vars(owner)[name]
                    setattr(owner, name, ours)

    def __exit__(self, *_: Any) -> None:
        with self.lock:
            self.users -= 1
            if self.users == 0:
                for owner, name, _ in self.places:
                    setattr(owner, name, self.before[owner, name])
