"""Timing the ops on a device: `alexnet-kernels bench`. `alexnet_kernels.gpu_check` times the same.

timing.py      the protocol: warm-up, rotated inputs, CUDA graphs, interleaved rounds, medians
machine.py     what is said of the device
roofline.py    the fewest bytes and operations of every layer, and the rates that the device reaches
cases.py       every op at AlexNet's layers: its inputs, definition, peers, least work
peers.py       whole networks by others
rows.py        what is timed: an op, the optimizer's step, a network, each checked first
tables.py      Markdown, and what changed between two reports
plots.py       pictures
bench.py       which rows, and their report
"""
