"""The definition of every op in plain PyTorch, with the names and signatures of the public ops:
`pydiffuse.reference.<family>` is `pydiffuse.<family>.reference`."""

import sys

from pydiffuse.adaln import reference as adaln
from pydiffuse.attention import reference as attention
from pydiffuse.conv import reference as conv
from pydiffuse.guidance import reference as guidance
from pydiffuse.patch import reference as patch
from pydiffuse.routing import reference as routing
from pydiffuse.scan import reference as scan

__all__ = ["adaln", "attention", "conv", "guidance", "patch", "routing", "scan"]

for _name in __all__:
    sys.modules[f"{__name__}.{_name}"] = globals()[_name]
