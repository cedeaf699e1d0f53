"""The Triton kernels: operators of the namespace `alexnet_kernels_triton`, one file an op.

Each operator has the name, arguments, fake, autograd and autocast policy of the native one (`alexnet_kernels/ops`). The
kernels take float32, bfloat16 and float16 and compute in float32. Repeated calls are bitwise identical. `_config.py`
holds the launch constants.
"""

from alexnet_kernels import _library
from alexnet_kernels.ops._common import CONTRACTS, implement
from alexnet_kernels.triton import (  # noqa: F401
    augment,
    batch_norm_relu,
    conv2d_relu,
    conv2d_relu_backward,
    dropout,
    linear_relu_dropout,
    local_response_norm,
    lrn_max_pool2d,
    max_pool2d,
    sgd_step,
    space_to_depth,
    within_map_response_norm,
)

for _op in CONTRACTS:
    implement(_library.TRITON_NAMESPACE, _op)
