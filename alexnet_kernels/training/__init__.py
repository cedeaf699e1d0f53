"""Training, evaluation and prediction: what the `alexnet-kernels` command runs.

| module | |
|---|---|
| `settings` | what the result of a run depends on, recipes, the learning rate |
| `source`, `formats` | files of a folder or zip; which of them are images |
| `decoding`, `repair` | image files as tensors; the same without damaged metadata |
| `reading`, `labels` | names and places of splits, empty classes; files of labels |
| `image_set`, `shards`, `datasets` | image sets in a tree or zip, and prepared ones; opening either |
| `prepare`, `shard_writer` | writing prepared image sets |
| `augmentation` | the paper's crops, mirroring and colour shifts; statistics of a training set |
| `loader`, `prefetch` | samplers, data loaders, the LightningDataModule; batches copied to a GPU ahead of time |
| `metrics` | loss, top-1, top-5, confusion |
| `header`, `checkpoint` | what a checkpoint says about its run; checkpoint files |
| `module`, `callbacks` | the LightningModule; checkpoints, stopping, CSV, TensorBoard, progress |
| `distributed` | training in several processes |
| `spec`, `run`, `run_pictures` | one run: its specification, the run, the pictures it leaves |
| `seeds` | the same run with several seeds, mean and spread |
| `devices`, `precision` | picking a device, copies, autocast; bfloat16 with float32 masters |
| `inference` | accuracy, predictions and features of a trained network |
| `pictures` | drawing of filters, curves, predictions, neighbours, confusion |
| `throughput` | images/s of the parts of training, and which binds |

`CapturedStep` and `CapturedForward`, of `alexnet_kernels.capture`, run the step and the forward pass of any model as
one CUDA graph.

Importing the package loads none of its modules: each needs only the optional packages that it uses.
"""

from alexnet_kernels.capture import CapturedForward, CapturedStep

__all__ = ["CapturedForward", "CapturedStep"]
