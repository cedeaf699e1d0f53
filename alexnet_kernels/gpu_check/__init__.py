"""Checks and times this package on the GPU present, within minutes: `python -m alexnet_kernels.gpu_check --out DIR`.

__main__.py      the command's options
runner.py        runs the parts within the time, and restarts workers that crash
programs.py      the parts that run other programs: build, tests, counters, sanitizer
worker.py        the parts that run in a worker process
processes.py     processes with a time limit, and the log
plan.py          the parts in order, and each part's share of the time
findings.py      the file of JSON lines that every process appends to
convolutions.py  times of cuDNN's convolutions alone, beside this package's op
kernel_times.py  times of the kernels of a network's step
counters.py      Nsight Compute's counters of the kernels furthest from the memory floor
exercise.py      runs every op once on small odd shapes, for memory checkers
progress.py      a pytest plugin that records each test's outcome at once
report.py        Markdown and JSON of the findings
"""
