"""threadpoolctl's limits hold for the threads of pydiffuse.numpy, too, once this is imported.

import pydiffuse.integrations.threadpoolctl

with threadpoolctl.threadpool_limits(1):  # or user_api="pydiffuse", and no others
    pydiffuse.numpy.tcfg(cond, uncond, 7.5)
"""

from __future__ import annotations

from threadpoolctl import LibController, register

from pydiffuse.numpy import num_threads, set_num_threads
from pydiffuse.version import __version__


class ThreadController(LibController):  # type: ignore[misc]
    """What threadpoolctl finds by the file of the extension."""

    user_api = "pydiffuse"
    internal_api = "pydiffuse"
    filename_prefixes = ("_host",)
    check_symbols = ("PyInit__host",)

    def get_num_threads(self) -> int:
        return num_threads()

    def set_num_threads(self, num_threads: int) -> None:
        set_num_threads(num_threads)

    def get_version(self) -> str:
        return __version__

    def set_additional_attributes(self) -> None:
        pass


register(ThreadController)
