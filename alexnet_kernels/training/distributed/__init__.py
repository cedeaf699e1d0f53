"""Training in several processes.

| module | |
|---|---|
| `config` | how a run is split over processes |
| `environment` | torchrun's environment variables, and the store in which processes meet |
| `team` | the processes of a run: joining them, sums and checks over them |
| `watchdog` | detects a process that died or hangs, and ends the others |
| `launcher` | starts the processes of one machine |
| `strategy` | `alexnet_kernels.parallel` as a strategy of PyTorch Lightning |
"""
