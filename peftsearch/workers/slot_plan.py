"""How large a slot is, and how many of them a cluster holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from peftsearch.spec import ResourcesSpec, StudyError

Node = dict[str, float]
"""Ray's resources of a machine."""

_FILL = 0.75
"""A slot's CPUs are as many as leave at most a quarter of a cluster's CPUs unused."""


@dataclass(frozen=True)
class SlotPlan:
    """How many slots there are, and what each of their workers takes.

    Attributes:
        slots: Number of worker groups at the start.
        workers: Workers per group.
        cpus: CPUs (and threads) per worker.
        gpus: GPUs per worker.
        follows: Whether the number of slots follows the machines that are there (``slots: auto``).
    """

    slots: int
    workers: int
    cpus: int
    gpus: float
    follows: bool = True

    @classmethod
    def fit(
        cls, resources: ResourcesSpec, nodes: Sequence[Node], to_come: Sequence[Node] = (), *, grows: bool = False
    ) -> SlotPlan:
        """Choose what the study file leaves open, so that the slots fill the cluster.

        Args:
            resources: The study file's section.
            nodes: Ray's resources of every live node.
            to_come: Those of the nodes that an autoscaler may add.
            grows: Whether nodes may join: then more slots may be asked for than fit now.

        Raises:
            StudyError: The cluster cannot hold a single slot, now or later.
        """
        workers, gpus = resources.workers_per_trial, resources.gpus_per_worker
        cpus = resources.cpus_per_worker or _cpus(workers, gpus, nodes) or _cpus(workers, gpus, to_come) or 1
        plan = cls(slots=1, workers=workers, cpus=cpus, gpus=gpus, follows=resources.slots == "auto")
        now = plan.room(nodes)
        if not max(now, plan.room([*nodes, *to_come])):
            raise _too_small(plan, nodes)
        if resources.slots == "auto":
            slots = max(1, now)
        else:
            slots = resources.slots
            if slots > now and not (grows or to_come):
                raise StudyError(
                    f"{slots} slots do not fit: the cluster holds {now} of them (or write slots: auto)",
                    ("resources", "slots"),
                )
        return cls(slots=slots, workers=workers, cpus=cpus, gpus=gpus, follows=plan.follows)

    def room(self, nodes: Sequence[Node]) -> int:
        """How many slots of this size fit these nodes. A slot's workers may be on several of them."""
        fitting = 0
        for node in nodes:
            by_cpu = int(node.get("CPU", 0) // self.cpus)
            # Whole workers per GPU, or whole GPUs per worker: Ray does not split a worker over two halves of two GPUs.
            by_gpu = _workers_on(node.get("GPU", 0.0), self.gpus) if self.gpus else by_cpu
            fitting += min(by_cpu, by_gpu)
        return fitting // self.workers


def _workers_on(gpus: float, share: float) -> int:
    return int(gpus) * int(1 / share + 1e-9) if share < 1 else int(gpus // share)


def _cpus(workers: int, gpus: float, nodes: Sequence[Node]) -> int | None:
    """CPUs per worker where the study file leaves them open; None where there is no node for one."""
    if gpus:
        shares = [
            node.get("CPU", 0) / _workers_on(node["GPU"], gpus)
            for node in nodes
            if _workers_on(node.get("GPU", 0.0), gpus)
        ]
        return max(1, min(8, int(min(shares)))) if shares else None
    total = sum(int(node.get("CPU", 0)) for node in nodes)
    largest = max((int(node.get("CPU", 0)) for node in nodes), default=0) // workers
    # Machines differ: with the largest one's cores per worker, the others would stay empty.
    used = {cpus: SlotPlan(1, workers, cpus, 0).room(nodes) * workers * cpus for cpus in range(max(1, largest), 0, -1)}
    if not total or not any(used.values()):
        return None
    return next((cpus for cpus, taken in used.items() if taken >= _FILL * total), max(used, key=lambda c: used[c]))


def _too_small(plan: SlotPlan, nodes: Sequence[Node]) -> StudyError:
    cpus, gpus = (int(sum(node.get(name, 0) for node in nodes)) for name in ("CPU", "GPU"))
    needed = plan.gpus * plan.workers
    if needed > gpus:
        return StudyError(
            f"a trial needs {needed:g} GPUs and the cluster has {gpus:g}: "
            "lower resources.gpus_per_worker or resources.workers_per_trial",
            ("resources", "gpus_per_worker"),
        )
    return StudyError(
        f"a trial needs {plan.workers} workers with {plan.cpus} CPUs each and the cluster has {cpus} CPUs: "
        "lower resources.cpus_per_worker or resources.workers_per_trial",
        ("resources", "cpus_per_worker"),
    )
