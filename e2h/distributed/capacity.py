"""Room for the workers: what can never come is refused at once, what may come is waited for."""

from __future__ import annotations

import functools
import os
import time
from pathlib import Path
from typing import Any

from ray.util import placement_group, remove_placement_group

from e2h.config import ScalingConfig, expect
from e2h.data.remote import Place
from e2h.distributed import autoscaler
from e2h.distributed.console import say
from e2h.distributed.nodes import HEAD, alive, check_shared, describe, describe_nodes, slots
from e2h.errors import InputError

# Ray Train's own name for the time that a group of workers may take to come.
START_TIMEOUT = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"
START_TIMEOUT_S = 900.0
POLL_S = 0.5
SILENT_S = 5.0  # room that is there takes a moment, on one machine too; nobody needs to read of it


def check_capacity(scaling: ScalingConfig) -> None:
    """Refuses more workers than the nodes, and those that the autoscaler may add, can ever hold.

    An elastic group needs room for its fewest workers; but of an autoscaler Ray asks for the most of them at once, and
    gets none where it can't have all. Where the autoscaler's configuration can't be read, or doesn't say what nodes
    have, `await_workers` leaves the answer to the autoscaler.

    Raises:
      InputError: naming the nodes, the node types, and how many workers would fit.
    """
    worker = _worker(scaling)
    fit_now = _fit(alive(), worker)
    if fit_now >= scaling.num_workers:
        return
    offer = autoscaler.offer()
    if offer is not None and offer.sized:
        heads = [node for node in alive() if HEAD in node["Resources"]]
        most = max(fit_now, _fit(heads, worker) + offer.slots(worker))
        if most < scaling.num_workers:
            _refuse(scaling, f"at most {most}, as this cluster has {describe_nodes()}; its autoscaler adds {offer}")
    elif fit_now < _fewest(scaling) and not autoscaler.report().autoscaler_state_version:
        _refuse(scaling, f"at most {fit_now}, as this cluster has {describe_nodes()}")


def await_nodes(scaling: ScalingConfig, root: Place) -> None:
    """Before work is given to nodes: there is room for the workers, and all that came see the same run."""
    await_workers(scaling)
    if isinstance(root, Path) and len(alive()) > 1:
        check_shared(root)


def await_workers(scaling: ScalingConfig) -> None:
    """Returns when there is room for all workers at once (of an elastic group: the fewest); says what is waited for.

    The time for that is RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S, by default 900 seconds.

    Raises:
      InputError: if the time is over, or the autoscaler says that the room can never come.
    """
    limit, begun, said = start_timeout_s(), time.monotonic(), ""
    knows_nodes = functools.cache(_knows_nodes)  # a task on the head, and the answer stays
    group = placement_group([_worker(scaling)] * _fewest(scaling))
    try:
        while not group.wait(POLL_S):
            state = autoscaler.report()
            hopeless = any(group.id.hex() in request.details for request in state.infeasible_gang_resource_requests)
            if hopeless and knows_nodes():
                _refuse(scaling, f"what the autoscaler can bring; there are {describe_nodes()}")
            if time.monotonic() - begun > limit:
                _refuse(scaling, f"room for them within {limit:g} s ({START_TIMEOUT}); there are {describe_nodes()}")
            silent = time.monotonic() - begun < min(SILENT_S, limit / 2)
            if not silent and (text := _waiting(scaling, state)) != said:
                said = text
                say("wait", f"{text}; for at most {limit:g} s")
    finally:
        remove_placement_group(group)


def _knows_nodes() -> bool:
    """Whether the autoscaler can tell what will never fit: nodes of unknown size all look too small to it."""
    offer = autoscaler.offer()
    return offer is None or offer.sized


def _worker(scaling: ScalingConfig) -> dict[str, float]:
    return {"CPU": scaling.cpus_per_worker, **({"GPU": 1.0} if scaling.use_gpu else {})}


def _fewest(scaling: ScalingConfig) -> int:
    return scaling.num_workers if scaling.min_workers is None else scaling.min_workers


def _fit(nodes: list[dict[str, Any]], worker: dict[str, float]) -> int:
    return sum(slots(node["Resources"], worker) for node in nodes)


def _waiting(scaling: ScalingConfig, state: Any) -> str:
    worker = _worker(scaling)
    coming = [f"{request.count} {request.ray_node_type_name}" for request in state.pending_instance_requests]
    coming += [f"1 {instance.ray_node_type_name}" for instance in state.pending_instances]
    asked = f"; on their way: {', '.join(coming)}" if coming else ""
    return f"room for {_fewest(scaling)} workers of {describe(worker)}; there are {describe_nodes()}{asked}"


def _refuse(scaling: ScalingConfig, expectation: str) -> None:
    each = describe(_worker(scaling))
    advice = "lower scaling.num_workers, or give the cluster more nodes or larger ones"
    expect(False, "scaling.num_workers", scaling.num_workers, f"{expectation} (a worker takes {each})", advice)


def start_timeout_s() -> float:
    """How long a group of workers may wait for its nodes."""
    given = os.environ.get(START_TIMEOUT, f"{START_TIMEOUT_S:g}")
    try:
        return float(given)
    except ValueError:
        raise InputError(f"{START_TIMEOUT}={given}: expected a number of seconds") from None
