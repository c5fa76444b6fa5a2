"""Warm slots on Ray Train, and the dispatcher that hands them segments."""

from peftsearch.workers.cluster_state import live_nodes, nodes_to_come
from peftsearch.workers.pool import LEAVE_SECONDS, SlotPool, quiet_ray_environment
from peftsearch.workers.slot_plan import SlotPlan

__all__ = ["LEAVE_SECONDS", "SlotPlan", "SlotPool", "live_nodes", "nodes_to_come", "quiet_ray_environment"]
