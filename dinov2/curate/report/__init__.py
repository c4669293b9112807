"""The report of a curation: one HTML page, and the table of all images and their fates."""

from dinov2.curate.report.fates import DROPPED, FATES
from dinov2.curate.report.sections import write_report

__all__ = ["DROPPED", "FATES", "write_report"]
