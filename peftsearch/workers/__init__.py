"""Warm slots on Ray Train, and the dispatcher that hands them segments."""

from peftsearch.workers.pool import SlotPlan, SlotPool, quiet_ray_environment

__all__ = ["SlotPlan", "SlotPool", "quiet_ray_environment"]
