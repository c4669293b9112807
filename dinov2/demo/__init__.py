"""What only the demos and the tests need: a small task on bundled photographs, a small crawl, and plots."""
