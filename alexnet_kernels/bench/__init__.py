"""Times the ops and networks beside baselines: `alexnet-kernels bench`. `alexnet_kernels.gpu_check` times them, too.

timing.py            the protocol: warm-up, rotated inputs, CUDA graphs, interleaved rounds, medians
machine.py           facts about the device and the software
roofline.py          the least work of a network's layers, and the measured rates of the device
cases.py             every op at AlexNet's layers, from `alexnet_kernels.op_info`
baselines.py         other implementations of whole networks
suite.py             problems of KernelBench
row.py               the protocol of a row, and its result
op_row.py optimizer_row.py network_row.py network_variant.py suite_row.py    the rows
rows.py              the selection of rows
report.py tables.py plots.py    JSON, Markdown, comparison of two reports, plots
"""
