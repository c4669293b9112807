"""Settings of the extract stage."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ExtractConfig:
    """Which links are taken from pages."""

    base_url: str = ""
    """Where plain HTML files come from, if they do not say themselves: their path is appended."""
    blocked_domains: str = ""
    """File or URL of domains, one a line, of which and of whose subdomains nothing is taken: unsafe, restricted."""
    allowed_domains: str = ""
    """The same of domains of which alone images are taken, unless they are blocked; all if there is no such file."""
    agent: str = "dinov2-curate"
    """Our name as a robot, to whom pages may speak by name."""
    honour_opt_out: bool = True
    """Take nothing from pages that ask so: noai, noimageai, noindex or noimageindex in a robots meta tag or in
    X-Robots-Tag."""
    opt_out: tuple[str, ...] = ("noai", "noimageai", "noindex", "noimageindex", "none")
    """The words by which they ask."""
    max_page_bytes: int = 2_000_000
    """Of a page; the rest of it is not read."""
    files_per_shard: int = 1000
    """HTML files of a task; an archive is a task of its own."""

    def __post_init__(self) -> None:
        for name in ("max_page_bytes", "files_per_shard"):
            if getattr(self, name) < 1:
                raise ValueError(f"extract.{name} must be positive, but is {getattr(self, name)}")
