"""Edits of a topology: what the imperative verbs decide, as functions from topology to topology.

Nothing here acts. The controller applies what comes out as it applies any other topology, so that
there is one way in which the system changes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, TypeAlias

from blockflow import topology as topology_file
from blockflow.errors import InvalidInput, NotFound
from blockflow.topology import BlockName, Generation, PipelineName, Topology

Change: TypeAlias = Callable[[Topology], Topology]
"""Makes the topology that should be out of the one that serves; raises when it cannot."""


class Verb(StrEnum):
    """What was asked for, as the history tells it."""

    SERVE = "serve"
    APPLY = "apply"
    ROLLBACK = "rollback"
    DEPLOY = "deploy"
    CONFIGURE = "configure"
    DELETE = "delete"


class Conflict(InvalidInput):
    """The edit contradicts what is deployed."""

    status = 409


class StaleGeneration(InvalidInput):
    """The edit was made for another generation than the one that serves."""

    status = 412


@dataclass(frozen=True)
class Terms:
    """On which terms a change is wanted.

    dry_run: only say what it would do. match: refuse unless this generation serves. timeout_s:
    seconds that the new workers may take to get ready, less than the server's own limit.
    """

    dry_run: bool = False
    match: Generation | None = None
    timeout_s: float | None = None

    def check(self, serving: Generation) -> None:
        """Raises StaleGeneration."""
        if self.match is not None and self.match != serving:
            raise StaleGeneration(
                f"generation {serving} serves, not {self.match}: somebody changed the topology in "
                "the meantime; read it again and decide anew"
            )


def replace(wanted: Topology) -> Change:
    """The declarative verb: whatever serves, `wanted` should."""
    return lambda _: wanted


def add_block(name: str, settings: Mapping[str, Any]) -> Change:
    """Deploy a block. `settings` are those of a topology file; raises TopologyInvalid, Conflict."""

    def change(current: Topology) -> Topology:
        if name in current.blocks:
            raise Conflict(f"there is a block {name} already; configure it, or choose another name")
        return _with(current, "blocks", name, settings)

    return change


def change_block(name: str, settings: Mapping[str, Any]) -> Change:
    """Set what `settings` names and leave the rest; null brings back a default.

    Raises NotFound, TopologyInvalid.
    """

    def change(current: Topology) -> Topology:
        _block(current, name)
        return _with(current, "blocks", name, _merged(current.blocks[name], settings))

    return change


def remove_block(name: str, cascade: bool = False) -> Change:
    """Remove a block that no pipeline uses, or with `cascade` those pipelines as well.

    Raises NotFound, Conflict.
    """

    def change(current: Topology) -> Topology:
        _block(current, name)
        users = [user for user, pipeline in current.pipelines.items() if name in pipeline.members]
        if users and not cascade:
            word = "pipeline" if len(users) == 1 else "pipelines"
            raise Conflict(
                f"block {name} is used by {word} {', '.join(users)}; delete or change "
                f"{'it' if len(users) == 1 else 'them'} first, or cascade"
            )
        return current.model_copy(
            update={
                "blocks": _without(current.blocks, {name}),
                "pipelines": _without(current.pipelines, {*users}),
            }
        )

    return change


def add_pipeline(name: str, settings: Mapping[str, Any]) -> Change:
    """Deploy a pipeline over blocks that are there; raises TopologyInvalid, Conflict."""

    def change(current: Topology) -> Topology:
        if name in current.pipelines:
            raise Conflict(
                f"there is a pipeline {name} already; configure it, or choose another name"
            )
        return _with(current, "pipelines", name, settings)

    return change


def change_pipeline(name: str, settings: Mapping[str, Any]) -> Change:
    """As `change_block`, for a pipeline. A chain takes the place of a graph, and the other way."""

    def change(current: Topology) -> Topology:
        _pipeline(current, name)
        merged = _merged(current.pipelines[name], settings)
        for form, other in (("blocks", "graph"), ("graph", "blocks")):
            if settings.get(form) is not None and other not in settings:
                merged.pop(other, None)
        return _with(current, "pipelines", name, merged)

    return change


def remove_pipeline(name: str) -> Change:
    """Remove a pipeline; its blocks stay. Raises NotFound."""

    def change(current: Topology) -> Topology:
        _pipeline(current, name)
        return current.model_copy(update={"pipelines": _without(current.pipelines, {name})})

    return change


def _block(current: Topology, name: str) -> BlockName:
    if name not in current.blocks:
        raise NotFound(f"there is no block {name}; there are: {_known(current.blocks)}")
    return BlockName(name)


def _pipeline(current: Topology, name: str) -> PipelineName:
    if name not in current.pipelines:
        raise NotFound(f"there is no pipeline {name}; there are: {_known(current.pipelines)}")
    return PipelineName(name)


def _known(members: Mapping[str, object]) -> str:
    return ", ".join(members) or "none"


def _merged(current: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    both = current.model_dump(mode="json", exclude_none=True) | dict(settings)
    return {name: value for name, value in both.items() if value is not None}


def _with(current: Topology, kind: str, name: str, settings: Mapping[str, Any]) -> Topology:
    # Through the file's own validation, so that a wrong setting is told in the same words.
    plain = current.model_dump(mode="json", exclude_none=True)
    plain[kind] = {**plain[kind], name: dict(settings)}
    return topology_file.parse(plain)


def _without(members: Mapping[str, Any], names: set[str]) -> dict[str, Any]:
    return {name: member for name, member in members.items() if name not in names}
