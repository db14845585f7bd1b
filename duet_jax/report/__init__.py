"""One self-contained page about a study."""

from duet_jax.report.page import write_report as write_report
