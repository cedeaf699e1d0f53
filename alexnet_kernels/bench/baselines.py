"""Other implementations of whole networks: torch.nn, torch.nn tuned for torch.compile, ONNX Runtime, TensorRT."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from alexnet_kernels.models import AlexNet
from alexnet_kernels.nn import LocalResponseNorm


def missing(package: str) -> str | None:
    """Why the package can't be used; None if it is installed."""
    return None if importlib.util.find_spec(package) else f"{package} is not installed"


def stock(model: AlexNet) -> nn.Sequential:
    """The same network of torch.nn's own modules where they exist. The parameters are shared."""

    def plain(module: nn.Module) -> nn.Module:
        if isinstance(module, LocalResponseNorm) and module.groups == 1:
            return nn.LocalResponseNorm(module.size, module.alpha, module.beta, module.k)
        if isinstance(module, nn.Dropout):
            return nn.Dropout(module.p)
        return module

    features, classifier = (nn.Sequential(*map(plain, part)) for part in (model.features, model.classifier))
    average = nn.AdaptiveAvgPool2d(model.avgpool.output_size)
    return nn.Sequential(features, average, nn.Flatten(), classifier).train(model.training)


@torch.library.custom_op("alexnet_kernels_baselines::max_pool2d", mutates_args=())
def _pool(input: Tensor, kernel_size: int, stride: int, ceil_mode: bool) -> tuple[Tensor, Tensor]:
    return torch.ops.aten.max_pool2d_with_indices(input, [kernel_size] * 2, [stride] * 2, [0, 0], [1, 1], ceil_mode)


@_pool.register_fake
def _(input: Tensor, kernel_size: int, stride: int, ceil_mode: bool) -> tuple[Tensor, Tensor]:
    return torch.ops.aten.max_pool2d_with_indices(input, [kernel_size] * 2, [stride] * 2, [0, 0], [1, 1], ceil_mode)


@torch.library.custom_op("alexnet_kernels_baselines::max_pool2d_backward", mutates_args=())
def _pool_backward(
    grad: Tensor, input: Tensor, indices: Tensor, kernel_size: int, stride: int, ceil_mode: bool
) -> Tensor:
    window = ([kernel_size] * 2, [stride] * 2, [0, 0], [1, 1], ceil_mode)
    return torch.ops.aten.max_pool2d_with_indices_backward(grad, input, *window, indices)


@_pool_backward.register_fake
def _(grad: Tensor, input: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(input)


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(inputs[0], output[1])
    ctx.window = inputs[1:]
    ctx.mark_non_differentiable(output[1])


_pool.register_autograd(
    lambda ctx, grad, _: (_pool_backward(grad, *ctx.saved_tensors, *ctx.window), None, None, None), setup_context=_setup
)


class NativePool(nn.Module):
    """Max-pooling by PyTorch's eager kernels: torch.compile's own backward scatters with atomics."""

    def __init__(self, pool: nn.MaxPool2d) -> None:
        super().__init__()
        self.window = (pool.kernel_size, pool.stride, pool.ceil_mode)

    def forward(self, x: Tensor) -> Tensor:
        return _pool(x, *self.window)[0]


class SlicedNorm(nn.Module):
    """Local response normalisation as a sum of shifted slices, which torch.compile fuses into one pass."""

    def __init__(self, norm: nn.LocalResponseNorm) -> None:
        super().__init__()
        self.size, self.alpha, self.beta, self.k = norm.size, norm.alpha, norm.beta, norm.k

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        channels, half = x.shape[1], self.size // 2
        padded = nn.functional.pad(wide * wide, (0, 0, 0, 0, half, self.size - 1 - half))
        total = sum(padded[:, i : i + channels] for i in range(self.size))
        return (wide * (self.k + self.alpha / self.size * total) ** -self.beta).to(x.dtype)


def hardened(model: AlexNet) -> nn.Sequential:
    """`stock` tuned for torch.compile: normalisation in one fused pass, and the eager backward of max-pooling."""

    def swapped(module: nn.Module) -> nn.Module:
        if type(module) is nn.LocalResponseNorm:
            return SlicedNorm(module)
        return NativePool(module) if isinstance(module, nn.MaxPool2d) else module

    features, *rest = stock(model).children()
    return nn.Sequential(nn.Sequential(*map(swapped, features.children())), *rest).train(model.training)


def _classes(model: AlexNet) -> int:
    return len(model.classifier[-1].weight)  # type: ignore[arg-type]


def torchvision_alexnet(model: AlexNet) -> nn.Module:
    from torchvision.models import alexnet

    baseline = alexnet(num_classes=_classes(model))
    baseline.load_state_dict(model.state_dict())
    return baseline.to(next(model.parameters()).device).train(model.training)


def to_onnx(model: AlexNet, batch: int, size: int) -> Any:
    """The network at inference as an ONNX model in float32, from "images" [batch, 3, size, size] to logits.

    Raises:
        ValueError: ONNX has no operator for a layer.
    """
    from onnx import TensorProto, helper, numpy_helper

    nodes: list[Any] = []
    weights: list[Any] = []
    x = "images"

    def constant(name: str, value: Tensor) -> str:
        weights.append(numpy_helper.from_array(value.detach().float().cpu().contiguous().numpy(), name))
        return name

    def add(operator: str, *inputs: str, **attributes: Any) -> None:
        nonlocal x
        output = f"value{len(nodes)}"
        nodes.append(helper.make_node(operator, [x, *inputs], [output], **attributes))
        x = output

    layers = [*model.features, model.avgpool, nn.Flatten(), *model.classifier]
    for i, layer in enumerate(layers):
        if isinstance(layer, nn.Conv2d):
            named = [constant(f"{name}{i}", value) for name, value in layer.named_parameters()]
            pads = [*layer.padding, *layer.padding]
            add("Conv", *named, group=layer.groups, strides=list(layer.stride), pads=pads)
        elif isinstance(layer, nn.Linear):
            named = [constant(f"{name}{i}", value) for name, value in layer.named_parameters()]
            add("Gemm", *named, transB=1)
        elif isinstance(layer, nn.ReLU):
            add("Relu")
        elif isinstance(layer, nn.MaxPool2d):
            pair = [layer.kernel_size] * 2, [layer.stride] * 2
            add("MaxPool", kernel_shape=pair[0], strides=pair[1], ceil_mode=int(layer.ceil_mode))
        elif isinstance(layer, nn.LocalResponseNorm) and getattr(layer, "groups", 1) == 1:
            add("LRN", size=layer.size, alpha=layer.alpha, beta=layer.beta, bias=float(layer.k))
        elif isinstance(layer, nn.BatchNorm2d):
            values = [layer.weight, layer.bias, layer.running_mean, layer.running_var]
            named = [constant(f"norm{i}_{j}", value) for j, value in enumerate(values) if value is not None]
            add("BatchNormalization", *named, epsilon=layer.eps)
        elif isinstance(layer, nn.Flatten):
            add("Flatten")
        elif isinstance(layer, nn.AdaptiveAvgPool2d):
            with torch.no_grad():
                maps = model.features(torch.empty(1, 3, size, size, device=next(model.parameters()).device)).shape[2:]
            if tuple(maps) != layer.output_size:
                raise ValueError(f"ONNX has no adaptive pooling of {tuple(maps)} to {layer.output_size}")
        elif not isinstance(layer, nn.Dropout):
            raise ValueError(f"ONNX has no operator for {type(layer).__name__} with these settings")
    classes = _classes(model)
    graph = helper.make_graph(
        nodes,
        "AlexNet",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, [batch, 3, size, size])],
        [helper.make_tensor_value_info(x, TensorProto.FLOAT, [batch, classes])],
        weights,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def onnxruntime(model: AlexNet, images: Tensor) -> Callable[[], Tensor]:
    """Inference by ONNX Runtime on the CPU, with torch's number of threads."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    graph = to_onnx(model, len(images), images.shape[-1]).SerializeToString()
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    pixels = images.float().contiguous().numpy()
    name = session.get_outputs()[0].name
    return lambda: torch.from_numpy(session.run([name], {"images": pixels})[0])


def tensorrt(model: AlexNet, images: Tensor) -> Callable[[], Tensor]:
    """Inference by TensorRT, in bfloat16 if the images are."""
    import tensorrt as trt

    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(to_onnx(model, len(images), images.shape[-1]).SerializeToString()):
        raise RuntimeError(f"TensorRT can't read the network: {parser.get_error(0)}")
    config = builder.create_builder_config()
    if images.dtype == torch.bfloat16:
        config.set_flag(trt.BuilderFlag.BF16)
    engine = trt.Runtime(logger).deserialize_cuda_engine(builder.build_serialized_network(network, config))
    context = engine.create_execution_context()
    pixels = images.float().contiguous()
    logits = torch.empty(len(images), _classes(model), device=images.device)
    names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
    for name in names:
        context.set_tensor_address(name, (pixels if name == "images" else logits).data_ptr())

    def call() -> Tensor:
        context.execute_async_v3(torch.cuda.current_stream().cuda_stream)
        return logits

    return call
