"""Ray workers without a model. Their processes import this module, so it imports neither torch nor pytest."""

from __future__ import annotations

import os
from typing import Any

from scale_rae.errors import InputError
from scale_rae.scaling.events import PromptFinished
from scale_rae.scaling.ray_cluster import Actor, Reply
from scale_rae.scaling.settings import Settings
from scale_rae.scaling.worker import Assignment


class Fragile(Actor):
    """A worker that dies of prompt 7, and takes a second for each other prompt."""

    def load(self, folder: str, settings: Settings, assignment: Assignment, holder: str) -> Reply:
        import ray

        self._node, self._seconds = ray.get_runtime_context().get_node_id(), 0.0
        return Reply(self._node, [], {})

    def attempt(self, group: Any) -> Reply:
        if any(prompt.index == 7 for prompt in group):
            os._exit(1)
        self._seconds += len(group)
        return Reply(self._node, [PromptFinished(p.index, p.prompt, 4, 4) for p in group], {"drawing": self._seconds})


class Broken(Actor):
    """A worker that dies while it loads; it fails with a message where one sample per round is asked for."""

    def load(self, folder: str, settings: Settings, assignment: Assignment, holder: str) -> Reply:
        if settings.n_samples == 1:
            raise InputError("no such model")
        os._exit(1)
