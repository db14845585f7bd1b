"""Mistakes in what a user gave us; each carries one sentence that says what would be right."""

from __future__ import annotations


class DuetError(Exception):
    """A mistake of input. The command line prints its sentence and exits with status 2."""


class ConfigError(DuetError, ValueError):
    """A configuration field is unknown, of the wrong type or out of range."""


class DataError(DuetError, ValueError):
    """A data file is missing, empty or malformed."""


class ModelError(DuetError, ValueError):
    """A model or checkpoint is missing, unreadable or does not fit."""


class FeedbackError(DuetError, ValueError):
    """A feedback value cannot be recorded."""


class StudyError(DuetError, RuntimeError):
    """A study directory is locked, damaged or belongs to another job."""


class Overtaken(StudyError):
    """A trial is another worker's by now, or closed."""
