"""Curation: from a web crawl to a balanced set of images to pretrain on (DINOv2, section 3 and appendix A)."""
