"""The report of a curation, as one HTML page."""

from dinov2.curate.report.sections import write_report

__all__ = ["write_report"]
