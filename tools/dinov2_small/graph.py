"""The backbone of an ONNX graph that was exported from Hugging Face's ``Dinov2Model``, as timm's tensors.

The export keeps the names of parameters, but for those that it has folded: the transposed matrices of linear layers and
the two parts of the position embedding have made-up names. These are found by what the graph does with them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
import torch
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from torch import Tensor

from eva_lightning.errors import InputError
from eva_lightning.names import shown
from eva_lightning.reading import reading
from tools.dinov2_small.network import create_network
from tools.dinov2_small.release import Architecture

_EMBEDDINGS, _LAYER, _LAST = "backbone.embeddings.", "backbone.encoder.layer.", "backbone.layernorm."
#: timm's name of a linear layer of a block -> those of Hugging Face, one above the other.
_LINEAR = {
    "attn.qkv": tuple(f"attention.attention.{part}" for part in ("query", "key", "value")),
    "attn.proj": ("attention.output.dense",),
    "mlp.fc1": ("mlp.fc1",),
    "mlp.fc2": ("mlp.fc2",),
}
#: Other parameters of a block: timm's name -> that of Hugging Face.
_OTHERS = {
    **{f"norm{i}.{kind}": f"norm{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")},
    **{f"ls{i}.gamma": f"layer_scale{i}.lambda1" for i in (1, 2)},
}


class Backbone:
    """The part of an ONNX graph that ends in the backbone's last norm.

    Args:
        content: Bytes of the file.
        name: What it is called in errors.
        architecture: What the backbone must be.

    Attributes:
        model: This part as a graph of its own, from images ``(B, 3, H, W)`` to tokens ``(B, 1 + N, width)``.
        tensors: timm's state dict.

    Raises:
        InputError: It is no whole ONNX file, or of another network; one sentence that names a tensor.
    """

    def __init__(self, content: bytes, name: str, architecture: Architecture) -> None:
        self._name, self._architecture = name, architecture
        with reading(name, "get it again", "ONNX file"):
            whole = onnx.load_model_from_string(content)
        self._makers = {output: node for node in whole.graph.node for output in node.output}
        last = next((node for node in whole.graph.node if f"{_LAST}bias" in node.input), None)
        if last is None:
            raise self._refusal(f"it lacks '{_LAST}bias'")
        self._nodes = self._before(last.output[0], whole)
        self._parameters = dict(_parameters(self._nodes, whole))
        self._taken: set[str] = set()
        self.model = _extracted(self._nodes, last.output[0], whole)
        self.tensors = self._converted()

    def _refusal(self, reason: str) -> InputError:
        return InputError(f"ONNX file {self._name} is not of {self._architecture.label}: {reason}")

    def _before(self, output: str, whole: ModelProto) -> list[NodeProto]:
        """The nodes that `output` depends on, in the order of the graph."""
        needed, waiting = {output}, [output]
        while waiting:
            node = self._makers.get(waiting.pop())
            new = {name for name in (node.input if node is not None else ()) if name} - needed
            needed |= new
            waiting += new
        return [node for node in whole.graph.node if needed.intersection(node.output)]

    def _converted(self) -> dict[str, Tensor]:
        """timm's tensors, each of the shape it has in timm's own model."""
        with torch.device("meta"):
            shapes = {name: tuple(t.shape) for name, t in create_network(self._architecture).state_dict().items()}
        found = {name: self._tensor(name, shape) for name, shape in shapes.items()}
        surplus = [
            name
            for name, tensor in self._parameters.items()
            if name not in self._taken and tensor.data_type == TensorProto.FLOAT and np.prod(tensor.dims) > 1
        ]
        if surplus:
            raise self._refusal(f"it has the surplus {', '.join(map(shown, surplus[:3]))}{_more(surplus)}")
        return found

    def _tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The tensor that timm calls `name`."""
        if name == "cls_token":
            return self._take(f"{_EMBEDDINGS}cls_token", shape)
        if name == "pos_embed":
            of_class, of_patches = self._position_embedding()
            first, rest = (1, 1, shape[2]), (1, shape[1] - 1, shape[2])
            return torch.cat([self._take(of_class, first), self._take(of_patches, rest)], 1)
        if name.startswith("patch_embed.proj."):
            return self._take(name.replace("patch_embed.proj.", f"{_EMBEDDINGS}patch_embeddings.projection."), shape)
        if name.startswith("norm."):
            return self._take(name.replace("norm.", _LAST), shape)
        _, block, rest_of_name = name.split(".", 2)
        if rest_of_name in _OTHERS:
            return self._take(f"{_LAYER}{block}.{_OTHERS[rest_of_name]}", shape)
        layer, kind = rest_of_name.rsplit(".", 1)
        parts = [f"{_LAYER}{block}.{part}.bias" for part in _LINEAR[layer]]
        rows = shape[0] // len(parts)
        if kind == "bias":
            return torch.cat([self._take(part, (rows,)) for part in parts])
        return torch.cat([self._take(self._weight_before(part), (shape[1], rows)).T for part in parts]).contiguous()

    def _take(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A parameter of the graph, of the shape that it must have."""
        if name not in self._parameters:
            raise self._refusal(f"it lacks {shown(name)}")
        proto = self._parameters[name]
        if tuple(proto.dims) != shape:
            raise self._refusal(f"{shown(name)} has shape {list(proto.dims)} where {list(shape)} is needed")
        if proto.data_type != TensorProto.FLOAT:
            kind = TensorProto.DataType.Name(proto.data_type) if proto.data_type in _KINDS else proto.data_type
            raise self._refusal(f"{shown(name)} is of type {kind} where FLOAT is needed")
        if proto.data_location == TensorProto.EXTERNAL:
            raise self._refusal(f"{shown(name)} lies in another file")
        self._taken.add(name)
        with reading(self._name, "get it again", "ONNX file"):
            return torch.from_numpy(numpy_helper.to_array(proto).copy())

    def _weight_before(self, bias: str) -> str:
        """The matrix of a linear layer: what the layer's input is multiplied with before `bias` is added."""
        for product in (name for node in self._users(bias, "Add") for name in node.input if name != bias):
            maker = self._makers.get(product)
            if maker is not None and maker.op_type == "MatMul":
                weights = [name for name in maker.input if name in self._parameters]
                if len(weights) == 1:
                    return weights[0]
        missing = bias if bias not in self._parameters else f"{bias.removesuffix('bias')}weight"
        raise self._refusal(f"it lacks {shown(missing)}")

    def _position_embedding(self) -> tuple[str, str]:
        """What is added to the tokens: the parts for the class token and for the patches."""
        name = f"{_EMBEDDINGS}cls_token"
        while users := [node for node in self._users(name) if node.op_type != "Shape"]:
            if users[0].op_type == "Add":
                others = [self._makers.get(other) for other in users[0].input if other != name]
                if len(others) == 1 and others[0] is not None and others[0].op_type == "Concat":
                    parts = [self._origin(part) for part in others[0].input]
                    if len(parts) == 2:
                        return parts[0], parts[1]
                break
            name = users[0].output[0]
        raise self._refusal(f"it lacks '{_EMBEDDINGS}position_embeddings'")

    def _users(self, name: str, kind: str = "") -> list[NodeProto]:
        return [node for node in self._nodes if name in node.input and kind in ("", node.op_type)]

    def _origin(self, name: str) -> str:
        """The parameter that a value is made of, by nodes whose first input it is."""
        for _ in range(len(self._nodes)):
            maker = self._makers.get(name)
            if name in self._parameters or maker is None or not maker.input:
                break
            name = maker.input[0]
        return name


_KINDS = set(TensorProto.DataType.values())


def _parameters(nodes: list[NodeProto], whole: ModelProto) -> Iterator[tuple[str, TensorProto]]:
    """Names and tensors of all that `nodes` hold: parameters, and constants of the program."""
    used = {name for node in nodes for name in node.input}
    yield from ((tensor.name, tensor) for tensor in whole.graph.initializer if tensor.name in used)
    for node in nodes:
        for attribute in node.attribute if node.op_type == "Constant" else ():
            if attribute.name == "value":
                yield node.output[0], attribute.t


def _extracted(nodes: list[NodeProto], output: str, whole: ModelProto) -> ModelProto:
    used = {name for node in nodes for name in node.input}
    kept = [tensor for tensor in whole.graph.initializer if tensor.name in used]
    inputs = [value for value in whole.graph.input if value.name in used - {tensor.name for tensor in kept}]
    graph = helper.make_graph(nodes, "backbone", inputs, [helper.make_empty_tensor_value_info(output)], kept)
    return helper.make_model(graph, opset_imports=list(whole.opset_import))


def _more(names: list[Any]) -> str:
    return f" and {len(names) - 3} more" if len(names) > 3 else ""
