"""`python -m alexnet_kernels` is the command `alexnet-kernels`."""

import sys

from alexnet_kernels.cli import main

sys.exit(main())
