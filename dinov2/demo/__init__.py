"""Helpers of the demos and tests only: a small task on bundled photographs, a small crawl, and plots."""
