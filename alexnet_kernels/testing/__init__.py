"""Checking and timing the ops on a device: `python -m alexnet_kernels.testing.gpu_check --out DIR`.

timing.py      the protocol: warm-up, rotated inputs, CUDA graphs, interleaved rounds, medians
cases.py       every op at AlexNet's layers: its inputs, definition, peers, fewest bytes and operations
exercise.py    every op once on small odd shapes, for memory checkers
progress.py    a pytest plugin that keeps what is known of a run that ends early
gpu_check.py   the command and its report
"""
