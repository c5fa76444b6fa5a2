"""How large a slot is, and how many of them a cluster holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from peftsearch.spec import ResourcesSpec, StudyError

Node = dict[str, float]
"""Ray's resources of a machine."""

_FOR_WORKERS = 0.9
"""Of a machine's memory; of the rest, Ray gives every trial actor a little, without which no trial begins."""


@dataclass(frozen=True)
class SlotPlan:
    """How many slots there are, and what each of their workers takes.

    Attributes:
        slots: Number of worker groups at the start.
        workers: Workers per group.
        cpus: CPUs (and threads) per worker.
        gpus: GPUs per worker.
        follows: Whether the number of slots follows the machines that are there (``slots: auto``).
        memory: Bytes of a machine that a worker is given, where memory and not its cores limits how many it holds; else
            0.
        most: So many slots at most, whatever machines join; None where nothing but them limits their number.
    """

    slots: int
    workers: int
    cpus: int
    gpus: float
    follows: bool = True
    memory: int = 0
    most: int | None = None

    @classmethod
    def fit(
        cls,
        resources: ResourcesSpec,
        nodes: Sequence[Node],
        to_come: Sequence[Node] = (),
        *,
        grows: bool = False,
        worker_bytes: int = 0,
        trials: int | None = None,
        threads: int | None = None,
        tell: Callable[[str], None] | None = None,
    ) -> SlotPlan:
        """Choose what the study file leaves open, so that the slots fill the cluster.

        On CPUs that is a worker for each core: small models gain little from further threads, and wait for them. Where
        there are fewer slots than cores (because the study file says so, memory holds no more, or there are not as many
        trials), they share the cores.

        Args:
            resources: The study file's section.
            nodes: Ray's resources of every live node.
            to_come: Those of the nodes that an autoscaler may add.
            grows: Whether nodes may join: then more slots may be asked for than fit now.
            worker_bytes: Memory that a worker is expected to take; 0 where that is not known.
            trials: Of the study: more slots than these are of no use.
            threads: With which the study has computed so far; it goes on with so many where the file leaves it open, as
                another number adds numbers in another order.
            tell: Told, in a sentence, when memory holds fewer slots than there are cores for, or GPUs stay idle.

        Raises:
            StudyError: The cluster cannot hold a single slot, now or later.
        """
        workers, gpus, auto = resources.workers_per_trial, resources.gpus_per_worker, resources.slots == "auto"
        cpus = resources.cpus_per_worker or (
            (_cpus_beside(gpus, nodes) or _cpus_beside(gpus, to_come) or 1) if gpus else 1
        )
        plan = cls(slots=1, workers=workers, cpus=cpus, gpus=gpus, follows=auto)
        idle = int(sum(node.get("GPU", 0) for node in [*nodes, *to_come]))
        if not gpus and idle and tell is not None:
            tell(
                f"the study trains on CPUs, and {idle} GPU{'s stay' if idle > 1 else ' stays'} idle: write "
                "resources: {gpus_per_worker: 1}, or --set resources.gpus_per_worker=1"
            )
        if not gpus and auto and threads and resources.cpus_per_worker is None:
            cpus = min(threads, max((int(node.get("CPU", 0)) for node in [*nodes, *to_come]), default=threads))
            plan = replace(plan, cpus=max(1, cpus))
        if not gpus:
            least = 1 if resources.slots == "auto" else resources.slots
            where = nodes if plan.room(nodes) >= least else [*nodes, *to_come]
            by_cores = plan.room(where)
            if auto:
                plan = replace(plan, memory=_limiting_memory(plan, where, worker_bytes))
            by_memory = plan.room(where)
            if auto:
                least = max(1, min(by_memory, trials or by_cores))
            if resources.cpus_per_worker is None and not (auto and threads):
                plan = _shared_cores(plan, where, least)
            if plan.memory and tell is not None:
                tell(
                    f"slots: auto makes {by_memory} of the {by_cores} slots that there are cores for: a worker "
                    f"is expected to take {worker_bytes / 2**30:.1f} GiB, and memory holds no more"
                )
        now = plan.room(nodes)
        if not max(now, plan.room([*nodes, *to_come])):
            raise _too_small(plan, nodes)
        if resources.slots == "auto":
            plan = replace(plan, most=trials)
            return replace(plan, slots=max(1, plan.room(nodes)))
        if resources.slots > now and not (grows or to_come):
            raise StudyError(
                f"{resources.slots} slots do not fit: the cluster holds {now} of them (or write slots: auto)",
                ("resources", "slots"),
            )
        return replace(plan, slots=resources.slots)

    def room(self, nodes: Sequence[Node]) -> int:
        """How many slots of this size fit these nodes. A slot's workers may be on several of them."""
        fitting = 0
        for node in nodes:
            by_cpu = int(node.get("CPU", 0) // self.cpus)
            # Whole workers per GPU, or whole GPUs per worker: Ray does not split a worker over two halves of two GPUs.
            by_gpu = _workers_on(node.get("GPU", 0.0), self.gpus) if self.gpus else by_cpu
            # Every machine says how much memory it has; of those to come an autoscaler's settings need not.
            by_memory = (
                int(_FOR_WORKERS * node["memory"] // self.memory) if self.memory and "memory" in node else by_cpu
            )
            fitting += min(by_cpu, by_gpu, by_memory)
        found = fitting // self.workers
        return found if self.most is None else min(found, self.most)


def _workers_on(gpus: float, share: float) -> int:
    return int(gpus) * int(1 / share + 1e-9) if share < 1 else int(gpus // share)


def _cpus_beside(gpus: float, nodes: Sequence[Node]) -> int | None:
    """CPUs per worker with GPUs where the study file leaves them open; None where there is no node for one."""
    shares = [
        node.get("CPU", 0) / _workers_on(node["GPU"], gpus) for node in nodes if _workers_on(node.get("GPU", 0.0), gpus)
    ]
    return max(1, min(8, int(min(shares)))) if shares else None


def _limiting_memory(plan: SlotPlan, nodes: Sequence[Node], worker_bytes: int) -> int:
    """What a worker is given of a machine's memory, so that the slots fit; 0 where the cores limit their number.

    One slot is tried in any case: what it is expected to take is an estimate.
    """
    largest = max((node["memory"] for node in nodes if "memory" in node), default=0.0)
    for memory in (worker_bytes, int(_FOR_WORKERS * largest // plan.workers)):
        held = replace(plan, memory=memory).room(nodes)
        if held:
            return memory if held < plan.room(nodes) else 0
    return 0


def _shared_cores(plan: SlotPlan, nodes: Sequence[Node], slots: int) -> SlotPlan:
    """With as many CPUs per worker as leave room for so many slots."""
    most = max((int(node.get("CPU", 0)) for node in nodes), default=0)
    wider = (replace(plan, cpus=cpus) for cpus in range(most, plan.cpus, -1))
    return next((each for each in wider if each.room(nodes) >= slots), plan)


def _too_small(plan: SlotPlan, nodes: Sequence[Node]) -> StudyError:
    cpus, gpus = (int(sum(node.get(name, 0) for node in nodes)) for name in ("CPU", "GPU"))
    needed = plan.gpus * plan.workers
    if needed > gpus:
        return StudyError(
            f"a trial needs {needed:g} GPUs and the cluster has {gpus:g}: "
            "lower resources.gpus_per_worker or resources.workers_per_trial",
            ("resources", "gpus_per_worker"),
        )
    if plan.gpus and not any(_workers_on(node.get("GPU", 0.0), plan.gpus) for node in nodes):
        most = max((node.get("GPU", 0.0) for node in nodes), default=0.0)
        return StudyError(
            f"a worker needs {plan.gpus:g} GPUs of one machine and none has more than {most:g}: "
            "lower resources.gpus_per_worker",
            ("resources", "gpus_per_worker"),
        )
    return StudyError(
        f"a trial needs {plan.workers} workers with {plan.cpus} CPUs each and the cluster has {cpus} CPUs: "
        "lower resources.cpus_per_worker or resources.workers_per_trial",
        ("resources", "cpus_per_worker"),
    )
