"""Checks and times this package on the GPU present, within minutes: `python -m alexnet_kernels.gpu_check --out DIR`.

__main__.py      the command's arguments
runner.py        starts the parts in processes of their own, within the time, and keeps what they find
plan.py          the parts, in order, and each one's share of the time
findings.py      the file of JSON lines that every process appends to
worker.py        the parts that run in a worker process
convolutions.py  cuDNN's convolutions one by one, beside this package's
kernel_times.py  which kernels a network's step spends its time in
counters.py      Nsight Compute's counters of the slowest kernels
exercise.py      every op once on small odd shapes, for memory checkers
progress.py      a pytest plugin that keeps what a run found, wherever it ends
report.py        Markdown and JSON of the findings
"""
