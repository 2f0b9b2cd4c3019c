"""The front door: one function an operation."""

from __future__ import annotations

from hip_kernels.attend.reference import attend
from hip_kernels.blocks import plan_blocks
from hip_kernels.summarize.reference import pool, summarize

__all__ = ["attend", "plan_blocks", "pool", "summarize"]
