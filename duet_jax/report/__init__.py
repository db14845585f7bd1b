"""One self-contained page about a study, or about a selection."""

from duet_jax.report.page import write_report as write_report
from duet_jax.report.selection import write_selection as write_selection
