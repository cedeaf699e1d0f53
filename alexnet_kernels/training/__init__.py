"""Training, evaluation and prediction: what the `alexnet-kernels` command runs.

| module | |
|---|---|
| `images` | reads ImageFolder trees and zips of them |
| `prepare`, `shards` | the same as memory-mapped squares |
| `augmentation` | the paper's crops, mirroring and colour shifts; statistics of a training set |
| `checkpoint` | atomic files, and networks read from them |
| `lightning` | the LightningModule, the LightningDataModule and the callbacks |
| `run` | one training run from its settings to its pictures |
| `settings` | what a run depends on, its recipes, the learning rate |
| `throughput` | images/s of the parts of a training step |
| `metrics` | top-1 and top-5 |
| `inference` | accuracy and predictions from a checkpoint |
| `pictures` | conv1's filters, curves, predictions |

Importing the package loads none of them, so that each asks for no more than it uses.
"""
