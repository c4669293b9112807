"""Settings of the download stage."""

from __future__ import annotations

from dataclasses import dataclass

from dinov2_kernels._version import __version__


@dataclass(frozen=True)
class DownloadConfig:
    """What is fetched, and how politely; limits on a host hold within a task, and a host is in one task if it fits."""

    agent: str = "dinov2-curate"
    """Our name as a robot, in User-Agent and robots.txt."""
    contact: str = ""
    """Where the owners of servers can complain: your page or address."""
    links_per_shard: int = 10_000
    """Links of a task, which makes one tar."""
    concurrency: int = 64
    """Requests of a task at once."""
    per_host: int = 2
    """Of these to one host."""
    delay: float = 0.1
    """Seconds between the beginnings of two requests to a host."""
    tries: int = 3
    """Of a link, where the failure may pass: no answer, too many requests, an error of the server."""
    backoff: float = 1.0
    """Seconds before the second try, twice as many before each further one."""
    max_wait: float = 60.0
    """Seconds to wait at most, whatever a server's Retry-After says."""
    connect_timeout: float = 10.0
    """Seconds to a connection."""
    timeout: float = 60.0
    """Seconds for all of a try."""
    max_bytes: int = 20_000_000
    """Of a file; what is larger is broken off."""
    max_pixels: int = 100_000_000
    """Of an image, as its header says."""
    min_side: int = 32
    """Pixels of the shorter side; icons and tracking pixels have less."""
    max_redirects: int = 5
    """Of a link, each of which is checked like the link itself."""
    robots: bool = True
    """Obey robots.txt."""
    honour_opt_out: bool = True
    """Leave images whose X-Robots-Tag asks so."""
    opt_out: tuple[str, ...] = ("noai", "noimageai", "noindex", "noimageindex", "none")
    """The words by which it asks."""
    blocked_domains: str = ""
    """File or URL of domains, one a line, from which nothing is fetched, by redirects neither."""
    allow_private_addresses: bool = False
    """Fetch from this machine and private networks too: for tests and for crawls of an own network."""

    def __post_init__(self) -> None:
        positive = ("links_per_shard", "concurrency", "per_host", "tries", "max_bytes", "max_pixels", "timeout")
        for name in (*positive, "connect_timeout", "min_side"):
            if getattr(self, name) <= 0:
                raise ValueError(f"download.{name} must be positive, but is {getattr(self, name)}")
        for name in ("delay", "backoff", "max_wait", "max_redirects"):
            if getattr(self, name) < 0:
                raise ValueError(f"download.{name} must be 0 or more, but is {getattr(self, name)}")
        if not self.agent or not self.agent.isascii() or "\n" in self.agent + self.contact:
            raise ValueError(f"download.agent must be a name in ASCII, but is {self.agent!r}")

    @property
    def user_agent(self) -> str:
        """What servers are told."""
        return f"{self.agent}/{__version__}" + (f" (+{self.contact})" if self.contact else "")
