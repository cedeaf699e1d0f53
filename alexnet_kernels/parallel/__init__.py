"""AlexNet in several processes: filters and neurons split into towers, batches into shards.

    mesh = init_device_mesh("cuda", (nodes, 2), mesh_dim_names=("data", "tower"))
    model = parallelize(AlexNet().cuda(), mesh, "towers")

See docs/parallel.md.
"""

from alexnet_kernels.parallel.checkpoint import export, full_state_dict, load, save
from alexnet_kernels.parallel.collectives import count_traffic
from alexnet_kernels.parallel.loss import cross_entropy
from alexnet_kernels.parallel.parallelism import Parallelism
from alexnet_kernels.parallel.plan import PLANS
from alexnet_kernels.parallel.sharding import parallelize
from alexnet_kernels.parallel.traffic import step_traffic

__all__ = [
    "PLANS",
    "Parallelism",
    "count_traffic",
    "cross_entropy",
    "export",
    "full_state_dict",
    "load",
    "parallelize",
    "save",
    "step_traffic",
]
