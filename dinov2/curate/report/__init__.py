"""The report of a curation: one HTML page, and the table of all images and their fates."""

from dinov2.curate.report.sections import write_report

__all__ = ["write_report"]
