"""Kinds of tasks with rows and right answers, one a file."""

from __future__ import annotations

from hf_shrink.evaluation.tasks.base import TASKS, Progressing, Row, Subject, Task

__all__ = ["TASKS", "Progressing", "Row", "Subject", "Task"]
