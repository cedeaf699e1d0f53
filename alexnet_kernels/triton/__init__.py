"""The Triton kernels: operators of the namespace `alexnet_kernels_triton`, one file an op.

Each operator has the name, arguments, fake, autograd and autocast policy of the native one (`alexnet_kernels/ops`). The
kernels take float32, bfloat16 and float16 and compute in float32. Repeated calls are bitwise identical. `_config.py`
holds the launch constants.
"""

import importlib
import pkgutil

from alexnet_kernels import _library
from alexnet_kernels._dispatch.contracts import CONTRACTS
from alexnet_kernels._dispatch.registration import implement

for _module in pkgutil.iter_modules(__path__):
    if not _module.name.startswith("_"):
        importlib.import_module(f"{__name__}.{_module.name}")
for _operator in CONTRACTS:
    implement(_library.TRITON_NAMESPACE, _operator)
