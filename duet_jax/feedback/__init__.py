"""Unseen tasks: whatever answers about a deployed model with one number."""

from duet_jax.feedback.coarse import Coarse
from duet_jax.feedback.deployed import Deployed, Engine
from duet_jax.feedback.outside import CommandTask, PythonTask, load_function
from duet_jax.feedback.tasks import Task, WeightedSum, build
from duet_jax.types import Feedback

__all__ = [
    "Coarse",
    "CommandTask",
    "Deployed",
    "Engine",
    "Feedback",
    "PythonTask",
    "Task",
    "WeightedSum",
    "build",
    "load_function",
]
