"""The routes that pass a block, as far as it knows them, and its channels to those who follow."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence

from blockflow.handover import Leg, Neighbour, Way
from blockflow.protocol import Route, RouteId, Step
from blockflow.reconcile import BlockSpec
from tensormq import Carrier, Peer, Push


class Ways:
    """The ways of the block `spec`, whose channels go out from `push`.

    neighbours: the blocks of this worker by endpoint, to which tensors are handed in the process.
    """

    def __init__(self, spec: BlockSpec, push: Push, neighbours: Mapping[str, Neighbour]) -> None:
        self._spec = spec
        self._push = push
        self._neighbours = neighbours
        self._known: dict[RouteId, Way] = {}
        self._peers: dict[tuple[str, bool], Peer] = {}

    def get(self, route: RouteId) -> Way | None:
        return self._known.get(route)

    def learn(self, route: Route) -> None:
        """Learn a route, and open the channels that it needs. Raises TensorMQError."""
        name = self._spec.name
        step = next(step for step in route.steps if step.block == name)
        following = route.following(name)
        answers = tuple(
            dict.fromkeys(each.port for each in route.gives.values() if each.block == name)
        )
        results = self._peer(route.results, tensors=bool(answers))
        legs = self._legs(route, following)
        if answers:
            legs.append(Leg((results,), answers))
        sent = [leg.to for leg in legs if isinstance(leg.to, tuple)]
        self._known[route.id] = Way(
            pipeline=route.pipeline,
            feeds=step.feeds,
            sources=step.sources,
            legs=tuple(legs),
            rows=min((self._spec.max_batch, *(each.max_batch for each in following))),
            results=results,
            followers=tuple(dict.fromkeys(itertools.chain(*sent))),
        )

    def forget(self, routes: Iterable[RouteId]) -> None:
        """Forget routes, and close the channels that no other needs.

        Without waiting for those at their other ends, who may compute for long: others wait here.
        """
        for route in routes:
            self._known.pop(route, None)
        needed = {id(way.results) for way in self._known.values()}
        needed |= {id(peer) for way in self._known.values() for peer in way.followers}
        for key, peer in tuple(self._peers.items()):
            if id(peer) not in needed:
                del self._peers[key]
                self._push.disconnect(peer, timeout=0)

    def _legs(self, route: Route, following: Sequence[Step]) -> list[Leg]:
        """Where outputs go that other blocks need: all of other workers get the same message."""
        joining = route.joining
        peers: list[Peer] = []
        warned: list[Peer] = []
        wanted: dict[str, None] = {}
        legs = []
        for step in following:
            outputs = dict.fromkeys(
                each.port for each in step.feeds.values() if each.block == self._spec.name
            )
            neighbour = self._neighbours.get(step.endpoint)
            if neighbour is not None:
                warn = (neighbour,) if step.block in joining else ()
                legs.append(Leg(neighbour, tuple(outputs), warn))
                continue
            peer = self._peer(step.endpoint, tensors=True)
            peers.append(peer)
            warned += [peer] if step.block in joining else []
            wanted |= outputs
        if peers:
            legs.insert(0, Leg(tuple(peers), tuple(wanted), tuple(warned)))
        return legs

    def _peer(self, endpoint: str, *, tensors: bool) -> Peer:
        """A channel to `endpoint`; one that only tells of failures takes no shared memory."""
        key = endpoint, tensors
        peer = self._peers.get(key)
        if peer is None or peer.lost is not None:
            carriers = None if tensors else [Carrier.INLINE]
            peer = self._peers[key] = self._push.connect(endpoint, carriers=carriers)
        return peer
