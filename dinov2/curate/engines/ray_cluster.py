"""Tasks on the machines of a Ray cluster, or on this machine's cores by a cluster that starts for the purpose."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from dinov2.curate.engines.engine import Call, LostTaskError, Outcome, execute
from dinov2_kernels._extras import require


class RayCluster:
    """Every task takes one core, and one GPU if it wants one and the cluster has any.

    Ray carries paths and settings alone; tasks read and write the storage themselves, which all machines must see, with
    the same packages installed. A task whose worker or machine is lost is reported as such, and not repeated by Ray.

    Args:
        address: of a running cluster, as ``ray.init`` takes it; None starts one here, which ends with this process.
        workers: tasks at once; 0 is as many as the cluster has room for.

    Raises:
        ImportError: Ray is missing (extra ``ray``).
    """

    def __init__(self, address: str | None = None, workers: int = 0) -> None:
        self._ray = require("ray", extra="ray", purpose="the Ray engine")
        self.workers = workers
        if not self._ray.is_initialized():
            here = {"num_cpus": workers} if address is None and workers else {}
            self._ray.init(address=address, include_dashboard=False, log_to_driver=False, **here)

    def run(self, calls: Sequence[Call], at_once: int | None = None) -> Iterator[Outcome]:
        """Hand calls to Ray, a few more than run at once, so that workers never wait for this process."""
        gpus = bool(self._ray.cluster_resources().get("GPU"))
        room = self.workers or 2 * int(self._ray.cluster_resources().get("CPU", 1))
        width = min(at_once or room, room)
        remote = self._ray.remote(max_retries=0, num_cpus=1)(execute)
        remaining = iter(calls)
        under_way = {}
        for call in itertools.islice(remaining, width):
            under_way[remote.options(num_gpus=int(call.gpu and gpus)).remote(call)] = call
        while under_way:
            (done, *_), _ = self._ray.wait(list(under_way), num_returns=1)
            call = under_way.pop(done)
            yield Outcome(call, self._error(done))
            if (following := next(remaining, None)) is not None:
                under_way[remote.options(num_gpus=int(following.gpu and gpus)).remote(following)] = following

    def _error(self, done: object) -> Exception | None:
        errors = self._ray.exceptions
        try:
            self._ray.get(done)
        except errors.RayTaskError as error:
            cause = error.cause
            return cause if isinstance(cause, Exception) else error
        except errors.RayError as error:
            return LostTaskError(f"the worker that made it is gone: {str(error).splitlines()[0]}")
        return None
